"""From `CompilerOptions` to a step that can be launched, one line a stage.

The stages, as `Timings` names them: source, wrap (meta build and probe), weights, passes, memory, compile (by whoever
owns the step) and graphs (capture of CUDA graphs). What a start has compiled and measured is kept for the next one of
the same model (`compiler/start_cache.py`).
Knows the order of the stages; knows nothing of requests, sockets or files of settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pagegraph.compiler.host.openmp_spin  # isort: skip  # noqa: F401  before torch is loaded, which reads it once

import torch

from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.inductor.cache import cache_folder, naming_the_cache, use_cache
from pagegraph.compiler.inductor.compile import Took, untold
from pagegraph.compiler.inductor.stored_forward import ForwardStore
from pagegraph.compiler.model.checkpoint import sidecar_quantization
from pagegraph.compiler.model.config_json import load_model_config
from pagegraph.compiler.model.files import json_object
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, Forwarded, PagedModel, wrap_model
from pagegraph.compiler.model.source import resolve_model
from pagegraph.compiler.model.weights import load_weights, plan_weights
from pagegraph.compiler.options import CompilerOptions, ModelOptions
from pagegraph.compiler.passes.registry import PassReport, apply_module_passes, graph_passes
from pagegraph.compiler.profile.kv_budget import (
    KvBudget,
    check_slots,
    cuda_available,
    left_for_blocks,
    plan_blocks,
)
from pagegraph.compiler.profile.memory import MemoryProfile, StoredProfiles, profile_memory
from pagegraph.compiler.quantization.linear import QuantExperts
from pagegraph.compiler.resolve import (
    eos_ids,
    resolve_cache_dtype,
    resolve_dtype,
    resolve_max_model_len,
    resolve_quantization,
)
from pagegraph.compiler.start_cache import StartCache, start_key
from pagegraph.compiler.step.caches import Caches
from pagegraph.compiler.step.capture_queue import MAX_DRAFT_FORWARDS, CaptureQueue, StoredOrder
from pagegraph.compiler.step.capture_sizes import MAX_CAPTURED_TOKENS, Bucket, CaptureSizes, cuda_capture_sizes
from pagegraph.compiler.step.dummy import dummy_step
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.staging import CpuStaging, CudaStaging
from pagegraph.compiler.step.state import DeviceState
from pagegraph.compiler.step.step import CompiledStep
from pagegraph.compiler.tensor_parallel.modules import join
from pagegraph.kernels.attention import cpu_decode, cpu_fixed
from pagegraph.kernels.attention.sections import section_of
from pagegraph.kernels.collective import groups
from pagegraph.kernels.inputs import cpp as inputs_cpp
from pagegraph.kernels.moe import cpu_few
from pagegraph.kernels.quant import cpu_int4
from pagegraph.kernels.sampling import cpp as sampling_cpp
from pagegraph.kernels.spec_decode import cpp as spec_decode_cpp

CompileState = Literal["off", "compiling", "compiled", "failed"]  # steps run the compiled forward when it is "compiled"


@dataclass(slots=True)
class Timings:
    """Seconds each stage of the start took, in order, and those of parts of stages."""

    seconds: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)  # stage -> part -> seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def took(self, stage: str) -> Took:
        """What is told the seconds of parts of this stage; those of the same name are added up."""
        parts = self.parts.setdefault(stage, {})

        def add(part: str, seconds: float) -> None:
            parts[part] = parts.get(part, 0.0) + seconds

        return add

    def __str__(self) -> str:
        return "  ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


@dataclass(slots=True, kw_only=True)
class BuiltModel:
    """A launchable step and the facts the engine needs beside it."""

    step: CompiledStep
    folder: Path
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    hidden_size: int  # of what the output head reads; 0 where it is not to be had
    max_model_len: int
    num_blocks: int
    eos_ids: frozenset[int]
    timings: Timings
    start_cache: StartCache | None = None  # where compiled forwards are kept; None: nowhere
    has_head: bool = True  # without one it gives embeddings alone
    draft: CompiledStep | None = None  # of the draft model, over the same blocks
    generation_config: dict[str, Any] = field(default_factory=dict)  # what generation_config.json of the model says
    compile_state: CompileState = "off"
    deterministic: bool = False  # see `PassOptions`
    closing: Callable[[], None] = lambda: None  # what ends with the model besides its steps
    slot_bytes: int = 0  # of the recurrent state that its layers keep for each slot; 0: none
    num_slots: int = 0  # with those that hold kept states, which come last

    @property
    def steps(self) -> list[CompiledStep]:
        """The model's step and, if there is one, the draft model's."""
        return [self.step] if self.draft is None else [self.step, self.draft]

    def use_idle_time(self) -> bool:
        """Let one step do a piece of what was put off at the start -> whether there was any."""
        return any(step.use_idle_time() for step in self.steps)

    def compile(self, progress: bool = False, first: Callable[[], None] = lambda: None) -> None:
        """Do `first`, compile the forwards of all models and swap them in: all of them or, if one fails, none.

        Safe beside launches.
        """
        self.compile_state = "compiling"
        try:
            first()
            forwards = self._compiled_forwards(progress)
        except BaseException:
            self.compile_state = "failed"
            raise
        for step, forward in zip(self.steps, forwards, strict=True):
            step.forward = forward
        self.compile_state = "compiled"

    def build_cpp(self) -> None:
        """Build the C++ of steps on a CPU, which passes over the graph look for; what is built already stays."""
        if self.device.type == "cpu":
            if self.deterministic:
                cpu_fixed.build()
            else:
                cpu_decode.build()
                cpu_int4.build()
            if any(isinstance(one, QuantExperts) for step in self.steps for one in step.paged_model.modules()):
                cpu_few.build()
            inputs_cpp.build()
            sampling_cpp.build()
            if self.step.state.ngram is not None:
                spec_decode_cpp.build()

    def _compiled_forwards(self, progress: bool) -> list[Callable[..., Forwarded]]:
        self.build_cpp()
        took = self.timings.took("compile")
        return [
            step.compiled_forward(warm_steps(step.state, self.deterministic), progress, store, took)
            for step, store in zip(self.steps, self._stores(took))
        ]

    @property
    def is_stored(self) -> bool:
        """Whether an earlier start has left the compiled forwards."""
        return all(store is not None and store.is_filled for store, _ in zip(self._stores(), self.steps))

    def _stores(self, took: Took = untold) -> list[ForwardStore | None]:
        """Of the model's forward and of the draft model's."""
        if self.start_cache is None:
            return [None, None]
        # On a CPU graphs hold kernels for the sizes of the caches; on CUDA these go to ops of ours as they are.
        any_blocks = self.device.type == "cuda"
        return [ForwardStore(self.start_cache, name, any_blocks, took) for name in ("forward", "draft-forward")]

    def capture_graphs(self, *, progress: bool, all_graphs: bool = True) -> None:
        """Capture CUDA graphs of whatever forward there is; does nothing on a CPU.

        Without `all_graphs` a few sizes are captured here and the others in idle time (`use_idle_time`).
        """
        if self.device.type == "cuda":
            with self.timings.stage("graphs"):
                for step, name in zip(self.steps, ("captures", "draft-captures")):
                    buckets = step.runner.capture_sizes.buckets()
                    if self.start_cache is None:
                        step.runner.queue = CaptureQueue(buckets)
                    else:
                        order = StoredOrder(self.start_cache, name)
                        step.runner.queue = CaptureQueue(buckets, order.read(), order.write)
                    step.runner.capture_graphs(buckets if all_graphs else step.runner.capture_sizes.first(), progress)

    def close(self) -> None:
        """Finish launched steps."""
        for step in self.steps:
            step.close()
        self.closing()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A wrapped model with its weights, and the facts that its configuration gives."""

    paged_model: PagedModel
    model_config: Any
    folder: Path
    dtype: torch.dtype
    cache_dtype: torch.dtype
    max_model_len: int
    generation_config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.model_config.get_text_config().vocab_size

    @property
    def num_layers(self) -> int:
        return self.model_config.get_text_config().num_hidden_layers

    @property
    def slot_bytes(self) -> int:
        """Of the recurrent state that its layers keep for each slot; 0: none."""
        return sum(layout.nbytes(self.dtype) for layout in self.paged_model.states)

    def num_slots(self, options: CompilerOptions) -> int:
        """Of recurrent state: one for each sequence, one for padding, and those that hold kept states."""
        kept = options.kv_cache.state_memory // self.slot_bytes if self.slot_bytes else 0
        return options.step.max_num_seqs + 1 + kept

    def draft_bytes(self, options: CompilerOptions) -> int:
        """Of what draft tokens bring to recurrent state: see `compiler.step.caches`."""
        most, states = options.step.max_draft_tokens, self.paged_model.states
        if not most or not states:
            return 0
        rows = options.step.max_num_seqs * (2 * most + 1)
        return rows * sum(one.draft_nbytes(self.dtype) for one in states) + 4 * self.num_slots(options)

    def state(self, options: CompilerOptions, num_blocks: int, *, is_draft: bool = False) -> DeviceState:
        """KV caches of so many blocks, and what else outlives a step. Only the target model verifies draft tokens."""
        block_size, seqs = options.kv_cache.block_size, options.step.max_num_seqs
        max_draft_tokens = 0 if is_draft else options.step.max_draft_tokens
        caches = Caches.of(
            self.paged_model.layouts,
            self.paged_model.states,
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=self.num_slots(options),
            dtype=self.cache_dtype,
            activation_dtype=self.dtype,
            device=options.device,
            batch_slots=seqs,
            max_draft_tokens=max_draft_tokens,
        )
        return DeviceState(
            caches,
            block_size=block_size,
            max_num_seqs=seqs,
            max_blocks=max(-(-self.max_model_len // block_size), 2),
            vocab_size=self.vocab_size,
            device=options.device,
            max_draft_tokens=max_draft_tokens,
            ngram=None if is_draft else options.step.ngram,
        )


def build_model(
    options: CompilerOptions,
    *,
    progress: bool = True,
    timings: Timings | None = None,
    watch: Callable[[LoadedModel, PassReport | None], None] = lambda model, report: None,
) -> BuiltModel:
    """Build the model, and its draft model if it has one; steps run uncompiled. Its stages are added to `timings`.

    watch: called with the loaded model, not the draft model, before the passes over modules (None) and behind each.

    Raises UnsupportedModel, DoesNotFit, QuantizationError, or ValueError naming the key at fault.
    """
    timings = timings or Timings()
    if options.ranks.size > 1 and not groups.is_known(options.ranks.group):
        raise ValueError(
            f"tensor_parallel_size={options.ranks.size}: runtime serve, runtime generate and LLM start the other ranks, this does"
            " not; set it to 1"
        )
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    use_cache(cache_folder(options.cache_dir))
    model = _load(options.model, options, timings, progress, watch=watch)
    draft = None
    if options.draft is not None:
        same_length = replace(options.draft, max_model_len=model.max_model_len)
        draft = _load(same_length, options, timings, progress, "draft ")
        _check_draft(options, model, draft)
    models = [model] if draft is None else [model, draft]
    with timings.stage("memory"):
        start_cache = _start_cache(options, models)
        num_blocks = _kv_budget(options, models, start_cache).num_blocks
        if options.ranks.size > 1:
            [num_blocks] = groups.least([num_blocks], options.ranks.group)
        states = [one.state(options, num_blocks, is_draft=one is draft) for one in models]
        # The same blocks for both: one set of block tables, brought up to date by whoever steps first.
        states[-1].block_tables = states[0].block_tables
        steps = [_step(options, one.paged_model, state) for one, state in zip(models, states)]
    tokenizer = options.model.tokenizer
    return BuiltModel(
        step=steps[0],
        draft=None if draft is None else steps[1],
        folder=model.folder,
        device=options.device,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        hidden_size=model.paged_model.hidden_size,
        has_head=model.paged_model.has_head,
        max_model_len=model.max_model_len,
        num_blocks=num_blocks,
        eos_ids=eos_ids(model.folder, model.model_config, Path(tokenizer) if tokenizer else None),
        timings=timings,
        start_cache=start_cache,
        generation_config=model.generation_config,
        deterministic=options.passes.deterministic,
        slot_bytes=model.slot_bytes,
        num_slots=model.num_slots(options),
    )


def build_compiled(options: CompilerOptions, *, progress: bool = True, all_graphs: bool = True) -> BuiltModel:
    """Build, compile if that is on, and capture CUDA graphs: steps run at full speed from the first on.

    all_graphs: see `BuiltModel.capture_graphs`. Raises what the compilation raised.
    """
    built = build_model(options, progress=progress)
    if options.compile:
        with built.timings.stage("compile"):
            built.compile(progress)
    built.capture_graphs(progress=progress, all_graphs=all_graphs)
    return built


def model_folder(options: ModelOptions, cache_dir: str | None, weights: bool = True) -> Path:
    """The folder of the model's files; they are fetched or converted now if they are not there yet.

    weights: whether a hub's model has to have its weights.
    """
    cache = cache_folder(cache_dir)
    with naming_the_cache(cache):
        return resolve_model(
            options.model,
            gguf_file=options.gguf_file,
            keep_quantized=options.quantization == "gguf",
            revision=options.revision,
            cache_dir=cache,
            trust_remote_code=options.trust_remote_code,
            weights=weights,
        )


def plan_models(options: CompilerOptions) -> list[LoadedModel]:
    """The model, and its draft model if it has one, as a build would have them, on the meta device: without values.

    No weights are fetched or read. `options.device` is where they would be; it need not be there.
    """
    model = _load(options.model, options, Timings(), False, planned=True)
    if options.draft is None:
        return [model]
    same_length = replace(options.draft, max_model_len=model.max_model_len)
    draft = _load(same_length, options, Timings(), False, planned=True)
    _check_draft(options, model, draft)
    return [model, draft]


def _load(
    model_options: ModelOptions,
    options: CompilerOptions,
    timings: Timings,
    progress: bool,
    name: str = "",
    *,
    planned: bool = False,
    watch: Callable[[LoadedModel, PassReport | None], None] = lambda model, report: None,
) -> LoadedModel:
    """The stages from the model's files to a wrapped model with weights; `name` is put before the stages' names.

    planned: weights have sizes and no values. watch: see `build_model`.
    """
    device, trust_remote_code = options.device, model_options.trust_remote_code
    with timings.stage(f"{name}source"):
        folder = model_folder(model_options, options.cache_dir, weights=not planned)
        generation_config = json_object(folder / "generation_config.json")
        model_config = load_model_config(folder, trust_remote_code=trust_remote_code)
        sidecar = None if model_options.load_format == "dummy" else sidecar_quantization(folder)
        quantization = resolve_quantization(
            model_options.quantization, model_config, device, sidecar, options.capability
        )
    dtype = resolve_dtype(model_options.dtype, model_config, device)
    cache_dtype = resolve_cache_dtype(options.kv_cache.dtype, dtype, device, options.capability)
    if options.passes.deterministic:
        _check_deterministic(device, dtype)
    max_model_len = resolve_max_model_len(model_options.max_model_len, model_config)
    with timings.stage(f"{name}wrap"):
        model = build_meta(
            model_config, dtype, ATTENTION_NAME, max_model_len=max_model_len, trust_remote_code=trust_remote_code
        )
        section = section_of(max_model_len) if options.passes.deterministic else 0
        paged_model = wrap_model(model, section, options.ranks)
    sharding = paged_model.sharding
    if paged_model.states:
        _check_recurrent(model_options, options)
    loaded = LoadedModel(paged_model, model_config, folder, dtype, cache_dtype, max_model_len, generation_config)
    if planned:
        plan_weights(
            model, folder, device_type=device.type, dtype=dtype, load_format=model_options.load_format,
            quantization=quantization, shards={} if sharding is None else sharding.shards,
        )  # fmt: skip
        if sharding is not None:
            join(model, sharding)
        apply_module_passes(model, options.passes, device.type)
        return loaded
    with timings.stage(f"{name}weights"):
        load_weights(
            model,
            folder,
            device=device,
            dtype=dtype,
            load_format=model_options.load_format,
            quantization=quantization,
            progress=progress,
            seed=model_options.seed,
            shards={} if sharding is None else sharding.shards,
        )
    with timings.stage(f"{name}passes"):
        if sharding is not None:
            join(model, sharding)
        watch(loaded, None)
        apply_module_passes(model, options.passes, done=lambda report: watch(loaded, report))
        return_freed_memory()
    return loaded


def _check_deterministic(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype not in cpu_fixed.DTYPES:
        raise ValueError(
            f"deterministic=true computes bfloat16 and float32 on a CPU, not {str(dtype).removeprefix('torch.')};"
            " set dtype to bfloat16, or deterministic to false"
        )


def _check_recurrent(model_options: ModelOptions, options: CompilerOptions) -> None:
    """Refuse what a model with recurrent state is not served with."""
    model = model_options.model
    if options.passes.deterministic:
        raise ValueError(
            f"deterministic=true: {model} has layers with recurrent state, whose sums depend on how a prompt is cut into"
            " chunks; set deterministic to false"
        )
    if options.draft is not None and model == options.draft.model:
        raise ValueError(
            f"speculative_model={model} has layers with recurrent state, which draft tokens that its target rejects would leave"
            " changed; name a model that attends in all layers, or set speculative_method to ngram"
        )


def _check_draft(options: CompilerOptions, model: LoadedModel, draft: LoadedModel) -> None:
    assert options.draft is not None
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"speculative_model={options.draft.model} has a vocabulary of {draft.vocab_size} tokens,"
            f" {options.model.model} one of {model.vocab_size}: only a model of the same vocabulary can draft;"
            " name one, or set speculative_method to ngram"
        )


def _step(options: CompilerOptions, paged_model: PagedModel, state: DeviceState) -> CompiledStep:
    largest = largest_step(options)
    passes = graph_passes(options.passes, options.device)
    if options.device.type == "cpu":
        return CompiledStep(paged_model, state, CpuStaging(state), None, passes)
    return CompiledStep(paged_model, state, CudaStaging(state, largest), capture_sizes_of(options), passes)


def capture_sizes_of(options: CompilerOptions) -> CaptureSizes:
    """Sizes of CUDA graphs."""
    return cuda_capture_sizes(options.step.max_decode_tokens, min(MAX_CAPTURED_TOKENS, largest_step(options).tokens))


def largest_step(options: CompilerOptions) -> Bucket:
    """Tokens and sequences of the largest step."""
    return Bucket(max(options.step.max_num_batched_tokens, 2), max(options.step.max_decode_tokens, 2))


def _start_cache(options: CompilerOptions, models: list[LoadedModel]) -> StartCache:
    """Of these models, as the options have them computed. What is measured has names of its own in it."""
    kv_cache = options.kv_cache
    more: dict[str, Any] = {
        "passes": asdict(options.passes),
        "caches": [kv_cache.block_size, *(str(model.cache_dtype) for model in models)],
        "lengths": [model.max_model_len for model in models],
    }
    if options.ranks.size > 1:
        more["ranks"] = [options.ranks.rank, options.ranks.size]
    if options.device.type == "cpu":
        more["blocks"] = [kv_cache.num_blocks, kv_cache.memory]
        more["slots"] = [model.num_slots(options) for model in models if model.slot_bytes]
    if models[0].slot_bytes:
        more["drafts"] = options.step.max_draft_tokens  # a forward hands them to layers with state
    key = start_key([model.paged_model for model in models], options.device, more)
    return StartCache(cache_folder(options.cache_dir), key)


def _kv_budget(options: CompilerOptions, models: list[LoadedModel], start_cache: StartCache) -> KvBudget:
    """Blocks that fit; on CUDA, if no amount is set, beside the profiled memory of steps and graphs."""
    kv_cache, max_num_seqs = options.kv_cache, options.step.max_num_seqs
    share = f"gpu_memory_utilization {kv_cache.gpu_memory_utilization}"
    if options.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(options.device)
        taken = total - free + models[0].draft_bytes(options)
        left = left_for_blocks(total, taken, kv_cache.gpu_memory_utilization, 0, 0)
        share = check_slots(left, models[0].slot_bytes, models[0].num_slots(options), share)
    states = [model.state(options, 1, is_draft=model is not models[0]) for model in models]
    block_bytes = sum(state.caches.block_bytes for state in states)
    if kv_cache.num_blocks is not None:
        available, source = kv_cache.num_blocks * block_bytes, f"num_blocks {kv_cache.num_blocks}"
    elif kv_cache.memory is not None:
        available, source = kv_cache.memory, "kv_cache_memory"
    else:
        known = StoredProfiles(start_cache, asdict(options.step))
        profiles = known.read()
        if options.ranks.size > 1 and not all(groups.least([profiles is not None], options.ranks.group)):
            profiles = None  # steps are measured on all ranks or on none: they sum
        if profiles is None:
            profiles = _profiles(options, models, states)
            known.write(profiles)
            profiles = [replace(one, kernels=0) for one in profiles]  # they are loaded
        available = cuda_available(
            kv_cache.gpu_memory_utilization,
            max(one.step for one in profiles) + sum(one.kernels for one in profiles),
            sum(one.graphs for one in profiles),
            options.device,
        )
        source = share
    return plan_blocks(available, block_bytes, kv_cache.block_size, models[0].max_model_len, max_num_seqs, source)


def _profiles(options: CompilerOptions, models: list[LoadedModel], states: list[DeviceState]) -> list[MemoryProfile]:
    """What steps of each model take."""
    return [
        profile_memory(
            _step(options, model.paged_model, state), largest_step(options), model.max_model_len, draft_forwards
        )
        for model, state, draft_forwards in zip(models, states, (0, MAX_DRAFT_FORWARDS))  # the draft model's alone
    ]


def warm_steps(state: DeviceState, deterministic: bool = False) -> list[StepInput]:
    """One dummy step for each compiled forward.

    A ragged step whose sizes differ (T, S, S + 1, width of the block tables), because Dynamo takes equal sizes for one
    symbol. On the CPU a step of a single token too, which gains from constant sizes, unless bits are to be those of others.
    """
    ragged = [5, 1, 3] if state.max_blocks not in (9, 3, 4) else [6, 1, 4, 3, 2]
    single = state.last_tokens.device.type == "cpu" and not deterministic
    wanted = [[1], ragged] if single else [ragged]
    return [dummy_step(lengths, state.dummy_slot) for lengths in wanted]
