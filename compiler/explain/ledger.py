"""Where memory goes: weights by kind and type, what steps take, graphs, and what is left for blocks of the KV cache.

Sizes are those of the tensors that a build makes, on the meta device: no formula of an architecture is here. How many
blocks follow, and when that is too few, `compiler.profile.kv_budget` says, as at a start. On CUDA the engine measures
what steps and graphs take; before that it is estimated (`compiler.explain.activations`). Knows no requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from pagegraph.compiler.build import LoadedModel, capture_sizes_of, plan_models
from pagegraph.compiler.explain.activations import StepMemory, step_memory
from pagegraph.compiler.explain.machines import Machine
from pagegraph.compiler.options import CompilerOptions, StepOptions
from pagegraph.compiler.profile.kv_budget import (
    CONTEXT,
    DoesNotFit,
    KvBudget,
    check_slots,
    left_for_blocks,
    plan_blocks,
)
from pagegraph.compiler.step.capture_queue import MAX_DRAFT_FORWARDS
from pagegraph.compiler.step.state import DeviceState

WeightKind = Literal["embedding", "attention", "recurrence", "MLP", "experts", "norms", "head", "other"]
META = torch.device("meta")
# What the driver holds of a captured graph for each kernel of the modules' forward, besides the memory that graphs share; starts
# capture the modules themselves to measure it. With it the estimate gives the blocks of starts on an H200
# (perf/results/h200-2026-11-28-* to h200-2026-11-30-*: 66 to 78 graphs of 24 to 32 layers) within a percent.
GRAPH_BYTES_A_LAUNCH = 36_000
FEW_SEQS, FEW_TOKENS = 64, 2048  # of a smaller largest step, for what does not fit otherwise


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of one kind and type."""

    kind: WeightKind
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class KvLayers:
    """Layers that keep and read keys and values alike. window: tokens that a row sees, 0 for all; chunk likewise."""

    layers: int
    window: int
    chunk: int
    bytes_a_token: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """The memory of one device, in bytes; of several that share a model, of the first."""

    machine: Machine
    gpus: int
    weights: list[Weights]
    kv_layers: list[KvLayers]
    state_layers: int  # that keep a state of fixed size for each slot
    num_slots: int  # of these states
    slots: int  # their bytes
    state: int  # what else outlives a step: block tables, each slot's last token, draft tokens with what they bring to
    # recurrent states, text
    step: StepMemory
    graphs: int
    num_graphs: int
    context: int  # of a process of CUDA's
    allowed: int  # of a GPU's memory; on a CPU what all of this takes
    block_size: int
    block_bytes: int  # on one GPU
    available: int  # for blocks
    source: str  # the setting that says how much
    num_blocks: int  # 0: it does not fit
    max_model_len: int
    refusal: str  # why not, and what would

    @property
    def weight_bytes(self) -> int:
        return sum(one.bytes for one in self.weights)

    @property
    def blocks(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def loaded(self) -> int:
        """What a build takes and keeps: all but the context and what the largest step takes while it runs."""
        return self.weight_bytes + self.slots + self.state + self.graphs + self.blocks

    def sequences(self, tokens: int) -> int:
        """How many sequences of so many tokens the blocks hold, the null block left out."""
        return max(self.num_blocks - 1, 0) // -(-tokens // self.block_size)


def ledger(options: CompilerOptions, models: list[LoadedModel], machine: Machine) -> Ledger:
    """What a build of `models`, as planned, takes on such a device."""
    states, seqs = planned_states(options, models), options.step.max_num_seqs
    weights = [one for model in models for one in weights_of(model.paged_model.model)]
    layers = [one for model, state in zip(models, states) for one in _kv_layers(model, state)]
    slot_bytes, num_slots = models[0].slot_bytes, models[0].num_slots(options)
    slots = slot_bytes * num_slots
    block_bytes = sum(state.caches.block_bytes for state in states)
    state_bytes = sum(state_tensors(state) for state in states)
    cuda = machine.device_type == "cuda"
    steps = [step_memory(options, model) for model in models]
    found = max(steps, key=lambda one: one.peak)
    num_graphs = graphs = 0
    if cuda:
        sizes = len(capture_sizes_of(options).buckets())
        forwards = [sizes + more for more in (0, MAX_DRAFT_FORWARDS)[: len(models)]]
        num_graphs = sizes * len(models)
        graphs = sum(one.pool + GRAPH_BYTES_A_LAUNCH * one.launches * count for one, count in zip(steps, forwards))
    context = CONTEXT if cuda else 0
    used = sum(one.bytes for one in weights) + slots + state_bytes + context
    kv_cache = options.kv_cache
    allowed = int(machine.memory * kv_cache.gpu_memory_utilization)
    if kv_cache.num_blocks is not None:
        available, source = kv_cache.num_blocks * block_bytes, f"num_blocks {kv_cache.num_blocks}"
    elif kv_cache.memory is not None:
        available, source = kv_cache.memory, "kv_cache_memory"
    else:
        available = left_for_blocks(machine.memory, used, kv_cache.gpu_memory_utilization, found.peak, graphs)
        source = f"gpu_memory_utilization {kv_cache.gpu_memory_utilization}"
    refusal, length = "", models[0].max_model_len
    budget = KvBudget(0, block_bytes)
    try:
        if kv_cache.num_blocks is None and kv_cache.memory is None:
            source = check_slots(available + slots, slot_bytes, num_slots, source)
        budget = plan_blocks(max(available, 0), block_bytes, kv_cache.block_size, length, seqs, source)
    except DoesNotFit as error:
        refusal = str(error)
    if cuda and not refusal and used + found.peak + graphs + budget.num_blocks * block_bytes > machine.memory:
        taken = used + found.peak + graphs + budget.num_blocks * block_bytes
        refusal = f"{source} asks for more than the GPU has: {taken / 2**30:.2f} of {machine.memory / 2**30:.2f} GiB."
    return Ledger(
        machine=machine, gpus=options.ranks.size, weights=weights, kv_layers=layers,
        state_layers=sum(len(model.paged_model.states) for model in models), num_slots=num_slots,
        slots=slots, state=state_bytes, step=found,
        graphs=graphs, num_graphs=num_graphs, context=context, block_size=kv_cache.block_size, block_bytes=block_bytes,
        allowed=allowed if cuda else used + found.peak + budget.num_blocks * block_bytes,
        available=available, source=source, num_blocks=budget.num_blocks, max_model_len=length, refusal=refusal,
    )  # fmt: skip


def planned_states(options: CompilerOptions, models: list[LoadedModel]) -> list[DeviceState]:
    """What outlives a step of each model, with one block, on the meta device."""
    there = replace(options, device=META)
    return [model.state(there, 1, is_draft=model is not models[0]) for model in models]


def state_tensors(state: DeviceState) -> int:
    """Bytes of all of a state but KV caches and recurrent states."""
    held = (state.block_tables, state.last_tokens, state.last_at, state.draft_tokens, state.history)
    return sum(one.nbytes for one in held if one is not None) + state.caches.draft_bytes


def _kv_layers(model: LoadedModel, state: DeviceState) -> list[KvLayers]:
    """By what they see; all of them keep every token of a sequence that runs."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for layout, *caches in zip(model.paged_model.layouts, *state.caches[:2]):
        found[layout.window, layout.chunk].append(sum(one[0].nbytes for one in caches) // state.block_size)
    return [KvLayers(len(sizes), *seen, sum(sizes)) for seen, sizes in found.items()]


def weights_of(model: nn.Module) -> list[Weights]:
    """Bytes of the tensors of `model` by kind and type, one that is shared once."""
    found: dict[tuple[WeightKind, str], int] = defaultdict(int)
    for kind, dtype, tensor in weight_tensors(model):
        found[kind, dtype] += tensor.nbytes
    order = list(WeightKind.__args__)  # type: ignore[attr-defined]
    return [Weights(*key, size) for key, size in sorted(found.items(), key=lambda one: order.index(one[0][0]))]


def weight_tensors(model: nn.Module) -> Iterator[tuple[WeightKind, str, torch.Tensor]]:
    """Kind, type and tensor of every weight and buffer, one that is shared once: an embedding that is the head too is its."""
    seen: set[int] = set()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    heads = set() if head is None else set(head.modules())
    parents = dict(model.named_modules())
    for path, module in parents.items():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        quantised = next(
            (str(one.dtype).removeprefix("torch.") for name, one in own if name in ("qweight", "packed")), None
        )
        for _, tensor in own:
            storage = tensor.untyped_storage()._cdata
            if storage in seen or not tensor.numel():
                continue
            seen.add(storage)
            kind = "embedding" if module is embedding else "head" if module in heads else _kind(path, parents, tensor)
            name = {"uint8": "int4", "float8_e4m3fn": "fp8"}.get(quantised, quantised) if quantised else None
            yield kind, f"{name} and scales" if name else str(tensor.dtype).removeprefix("torch."), tensor


def _kind(path: str, parents: dict[str, nn.Module], tensor: torch.Tensor) -> WeightKind:
    """By the innermost module that tells: class names of transformers, and whether experts are stacked."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        name = type(parents[".".join(parts[:end])]).__name__.lower()
        if "norm" in name:
            return "norms"
        if "expert" in name or "expert" in parts[end - 1]:
            return "experts"
        if any(word in name for word in ("mixer", "delta", "shortconv")):
            return "recurrence"
        if "attention" in name or "attn" in name or "attn" in parts[end - 1]:
            return "attention"
        if "mlp" in name or "moe" in name or "feedforward" in name or parts[end - 1] in ("mlp", "ffn", "feed_forward"):
            return "MLP"
        if "embedding" in name and tensor.dim() > 1:
            return "embedding"
        if "layer" in name and tensor.dim() > 1:  # a layer that holds its products itself
            return "MLP"
    return "other"


def _smaller_steps(options: CompilerOptions) -> Iterator[tuple[str, StepOptions]]:
    """Settings, and the options with them, each of which makes the largest step smaller."""
    step, said = options.step, ""
    if step.max_num_seqs > FEW_SEQS:
        step, said = replace(step, max_num_seqs=FEW_SEQS, max_decode_tokens=FEW_SEQS), f"max_num_seqs={FEW_SEQS}"
        yield said, step
    if step.max_num_batched_tokens > FEW_TOKENS >= options.step.max_decode_tokens:
        tokens = f"max_num_batched_tokens={FEW_TOKENS}"
        yield tokens, replace(options.step, max_num_batched_tokens=FEW_TOKENS)
        if said:
            yield f"{said} and {tokens}", replace(step, max_num_batched_tokens=FEW_TOKENS)


def would_fit(options: CompilerOptions, machine: Machine) -> list[str]:
    """Changes of one key with which a configuration that does not fit would, as `key=value` and what comes of it.

    Where no block was left before, with the longest sequences that fit then.
    """
    found = []
    models = plan_models(options)
    now = ledger(options, models, machine)
    if now.available >= 2 * now.block_bytes > 0:
        found.append(f"max_model_len={(now.available // now.block_bytes - 1) * now.block_size}")
    cuda = machine.device_type == "cuda"
    tries: list[tuple[str, CompilerOptions]] = []
    if options.kv_cache.dtype == "auto":
        tries.append(("kv_cache_dtype=fp8", replace(options, kv_cache=replace(options.kv_cache, dtype="fp8"))))
    if cuda and options.kv_cache.gpu_memory_utilization < 0.95 and options.kv_cache.memory is None:
        more = replace(options.kv_cache, gpu_memory_utilization=0.95)
        tries.append(("gpu_memory_utilization=0.95", replace(options, kv_cache=more)))
    if options.model.quantization is None:
        for method in ("fp8", "int8", "int4"):
            model = replace(options.model, quantization=method)
            tries.append((f"quantization={method}", replace(options, model=model)))
    if cuda:
        tries += [(said, replace(options, step=step)) for said, step in _smaller_steps(options)]
    for said, changed in tries:
        # Sizes of steps and of the cache change nothing of the models.
        same = changed.model == options.model and changed.kv_cache.dtype == options.kv_cache.dtype
        try:
            then = ledger(changed, models if same else plan_models(changed), machine)
        except ValueError:  # of this checkpoint, or this GPU: not a way out
            continue
        if not then.refusal:
            found.append(f"{said} ({then.num_blocks:,} blocks)")
        elif now.available < 2 * now.block_bytes <= then.available:
            shorter = (then.available // then.block_bytes - 1) * then.block_size
            found.append(f"{said} and max_model_len={shorter}")
    if cuda and not found:
        for size in (2, 4, 8):
            shared = replace(options, ranks=replace(options.ranks, size=size))
            try:
                if size > options.ranks.size and not ledger(shared, plan_models(shared), machine).refusal:
                    found.append(f"tensor_parallel_size={size}, as many GPUs (not measured yet)")
                    break
            except ValueError:  # so many cannot share it
                continue
    return found
