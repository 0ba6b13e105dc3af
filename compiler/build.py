"""From a checked configuration to a step that can be launched, one line a stage.

The stages: source, meta build, probe, weights, passes, memory, and (by whoever owns the step) compilation.
Reads plain values off the configuration; knows nothing of requests or sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

# isort: skip  # noqa: F401  before torch is loaded, which reads it once
from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.inductor import compile as lower
from pagegraph.compiler.model.capture import ATTENTION_NAME, CapturedModel, capture
from pagegraph.compiler.model.checkpoint import sidecar_quantization
from pagegraph.compiler.model.config_json import load_model_config
from pagegraph.compiler.model.files import json_object
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.source import resolve_model
from pagegraph.compiler.model.weights import load_weights
from pagegraph.compiler.passes import registry
from pagegraph.compiler.profile import kv_budget as memory
from pagegraph.compiler.profile import memory as trial
from pagegraph.compiler.resolve import (
    eos_ids,
    resolve_cache_dtype,
    resolve_device,
    resolve_dtype,
    resolve_max_model_len,
    resolve_quantization,
)
from pagegraph.compiler.step.capture_sizes import Bucket, cuda_ladder
from pagegraph.compiler.step.dummy import scrap_step
from pagegraph.compiler.step.graphs import CHAINED, Pending
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.staging import Staging
from pagegraph.compiler.step.state import DeviceState, Lookup
from pagegraph.compiler.step.step import CompiledStep
from pagegraph.kernels.attention import cpu_decode
from pagegraph.kernels.inputs import cpp as inputs_cpp
from pagegraph.kernels.quant import cpu_int4
from pagegraph.kernels.sampling import cpp as sampling_cpp
from pagegraph.kernels.spec_decode import cpp as spec_decode_cpp

MAX_CAPTURED_TOKENS = 16384

CompileState = Literal["off", "compiling", "compiled", "failed"]  # steps run the compiled forward when it is "compiled"


@dataclass(slots=True)
class Timings:
    """Seconds each stage of the start took, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def __str__(self) -> str:
        return "  ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


@dataclass(slots=True)
class BuiltModel:
    """A launchable step and the facts the engine needs beside it."""

    step: CompiledStep
    folder: Path
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    num_blocks: int
    eos_ids: frozenset[int]
    timings: Timings
    draft: CompiledStep | None = None  # of the draft model, over the same blocks
    generation_config: dict[str, Any] = field(default_factory=dict)  # what generation_config.json of the model says
    compile_state: CompileState = "off"

    @property
    def steps(self) -> list[CompiledStep]:
        """Of all models."""
        return [self.step] if self.draft is None else [self.step, self.draft]

    def use_idle_time(self) -> bool:
        """`CompiledStep.use_idle_time` of one of them."""
        return any(step.use_idle_time() for step in self.steps)

    def compile(self, progress: bool = False, first: Callable[[], None] = lambda: None) -> None:
        """Do `first`, compile all forwards, and what they call, and swap them in: all or, where one fails, none. Safe beside launches."""
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

    def _compiled_forwards(self, progress: bool) -> list[Callable[..., torch.Tensor]]:
        if self.device.type == "cpu":
            cpu_decode.build()
            cpu_int4.build()
            inputs_cpp.build()
            sampling_cpp.build()
            if self.step.state.lookup is not None:
                spec_decode_cpp.build()
        return [step.compiled_forward(warm_steps(step.state), progress) for step in self.steps]

    def close(self) -> None:
        """Finish launched steps."""
        for step in self.steps:
            step.close()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A captured model with its weights, and the facts that its configuration gives."""

    config: Any
    captured: CapturedModel
    model_config: Any
    folder: Path
    dtype: torch.dtype
    cache_dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    generation_config: dict[str, Any]

    def state(self, num_blocks: int, device: torch.device) -> DeviceState:
        """Caches of so many blocks, and what else outlives a step."""
        config = self.config
        return DeviceState(
            self.captured.layouts,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_blocks=max(-(-self.max_model_len // config.block_size), 2),
            vocab_size=self.vocab_size,
            dtype=self.cache_dtype,
            device=device,
            max_draft_tokens=config.max_draft_tokens,
            lookup=Lookup(config.prompt_lookup_min, config.prompt_lookup_max) if config.looks_up_on_device else None,
        )


def build(config: Any, *, progress: bool = True) -> BuiltModel:
    """Build the model of `config` (a `runtime.config.Config`), and its draft model, uncompiled.

    Raises UnsupportedModel, memory.DoesNotFit, QuantizationError, or ValueError naming the key at fault.
    """
    timings = Timings()
    device = resolve_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    lower.use_cache(lower.cache_folder(config.compile_cache_dir))
    model = _load(config, device, timings, progress)
    draft = None
    if config.draft is not None:
        draft = _load(replace(config.draft, max_model_len=model.max_model_len), device, timings, progress, "draft ")
        _check_draft(config, model, draft)
    models = [model] if draft is None else [model, draft]
    with timings.stage("memory"):
        num_blocks = _kv_budget(config, models, device).num_blocks
        states = [one.state(num_blocks, device) for one in models]
        # The same blocks for both: one set of block tables, brought up to date by whoever steps first.
        states[-1].block_tables = states[0].block_tables
        steps = [_step(config, one.captured, state) for one, state in zip(models, states)]
    return BuiltModel(
        steps[0], model.folder, device, model.dtype, model.vocab_size, model.max_model_len, num_blocks,
        eos_ids(model.folder, model.model_config, Path(config.tokenizer) if config.tokenizer else None), timings, None if draft is None else steps[1],
        model.generation_config,
    )  # fmt: skip


def model_folder(config: Any) -> Path:
    """Where the model's files lie: fetched and converted now where they are not there yet."""
    cache = lower.cache_folder(config.compile_cache_dir)
    with lower.naming_the_cache(cache):
        return resolve_model(
            config.model,
            gguf_file=config.gguf_file,
            keep_quantized=config.quantization == "gguf",
            revision=config.revision,
            cache_dir=cache,
            trust_remote_code=config.trust_remote_code,
        )


def _load(config: Any, device: torch.device, timings: Timings, progress: bool, name: str = "") -> Loaded:
    """The stages from the model's files to captured modules with weights; `name` goes before theirs."""
    with timings.stage(f"{name}source"):
        folder = model_folder(config)
        generation = json_object(folder / "generation_config.json")
        model_config = load_model_config(folder, trust_remote_code=config.trust_remote_code)
        beside = None if config.load_format == "dummy" else sidecar_quantization(folder)
        quantization = resolve_quantization(config.quantization, model_config, device, beside)
    dtype = resolve_dtype(config.dtype, model_config, device)
    cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, dtype, device)
    max_model_len = resolve_max_model_len(config.max_model_len, model_config)
    with timings.stage(f"{name}capture"):
        model = build_meta(
            model_config, dtype, ATTENTION_NAME, max_model_len=max_model_len, trust_remote_code=config.trust_remote_code
        )
        captured = capture(model)
    with timings.stage(f"{name}weights"):
        load_weights(
            model,
            folder,
            device=device,
            dtype=dtype,
            load_format=config.load_format,
            quantization=quantization,
            progress=progress,
            seed=config.seed,
        )
    with timings.stage(f"{name}passes"):
        registry.apply(model, config)
        return_freed_memory()
    vocab_size = model_config.get_text_config().vocab_size
    return Loaded(config, captured, model_config, folder, dtype, cache_dtype, max_model_len, vocab_size, generation)


def _check_draft(config: Any, model: Loaded, draft: Loaded) -> None:
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"speculative_model={config.speculative_model} has a vocabulary of {draft.vocab_size} tokens, {config.model} one of"
            f" {model.vocab_size}: only a model of the same vocabulary can draft; name one, or set speculative_method to ngram"
        )


def ready(config: Any, *, progress: bool = True) -> BuiltModel:
    """Build, compile and (on CUDA) capture: steps run at full speed from the first on."""
    built = build(config, progress=progress)
    finish(config, built, progress=progress)
    return built


def finish(config: Any, built: BuiltModel, *, progress: bool) -> None:
    """The stages after loading: compilation where it is on, graph capture on CUDA. Raises what the compilation raised."""
    if config.compile:
        with built.timings.stage("compile"):
            built.compile(progress)
    capture_graphs(built, progress=progress)


def capture_graphs(built: BuiltModel, *, progress: bool, all_graphs: bool = True) -> None:
    """On CUDA, of whatever forward there is. Without `all_graphs` few are captured here, and the others in the step's idle time."""
    if built.device.type == "cuda":
        with built.timings.stage("graphs"):
            for step in built.steps:
                rungs = step.ladder.buckets() if all_graphs else step.ladder.first()
                step.pending = Pending(step.ladder.buckets())
                step.capture_graphs(rungs, progress)


def _step(config: Any, captured: CapturedModel, state: DeviceState) -> CompiledStep:
    device = state.last_tokens.device
    largest = _largest(config, device)
    ladder = None
    if device.type == "cuda":
        ladder = cuda_ladder(config.max_entries, min(MAX_CAPTURED_TOKENS, largest.tokens))
    return CompiledStep(captured, state, Staging(state, largest), ladder, registry.graph_passes(config, device))


def _largest(config: Any, device: torch.device) -> Bucket:
    return Bucket(max(config.batched_tokens(device.type), 2), max(config.max_entries, 2))


def _kv_budget(config: Any, models: list[Loaded], device: torch.device) -> memory.KvBudget:
    """Blocks that fit; on CUDA, where no amount is set, beside the measured peak of steps and graphs."""
    states = [model.state(1, device) for model in models]
    block_bytes = sum(cache.nbytes for state in states for cache in (*state.key_caches, *state.value_caches))
    if config.num_blocks is not None:
        available, source = config.num_blocks * block_bytes, f"num_blocks {config.num_blocks}"
    elif device.type == "cpu" or config.kv_cache_memory is not None:
        available, source = config.cpu_kv_cache_memory(), "kv_cache_memory"
    else:
        peaks = [
            trial.measure(_step(config, model.captured, state), _largest(config, device), model.max_model_len, chained)
            for model, state, chained in zip(models, states, (0, CHAINED))  # the draft model does it in chains
        ]
        step_bytes, graph_bytes = max(peak.step for peak in peaks), sum(peak.graphs for peak in peaks)
        available = memory.cuda_available(config.gpu_memory_utilization, step_bytes, graph_bytes, device)
        source = f"gpu_memory_utilization {config.gpu_memory_utilization}"
    return memory.plan_blocks(available, block_bytes, config.block_size, models[0].max_model_len, source)


def warm_steps(state: DeviceState) -> list[StepInput]:
    """One scrap step for each compiled forward.

    A ragged step of distinct sizes, because the compiler takes sizes that are equal for the same: T, S, S + 1 and the
    width of the block tables. On the CPU, where a single token gains from constant sizes, such a step too.
    """
    ragged = [5, 1, 3] if state.max_blocks not in (9, 3, 4) else [6, 1, 4, 3, 2]
    wanted = [[1], ragged] if state.last_tokens.device.type == "cpu" else [ragged]
    return [scrap_step(lengths, state.scrap_row) for lengths in wanted]
