"""Everything that is said of a configuration, gathered: memory, steps, passes, what does not fit, what was measured.

Asks the compiler, which plans the model on the meta device. Knows no output form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pagegraph.compiler.build import LoadedModel, build_compiled, plan_models, warm_steps
from pagegraph.compiler.explain import measure
from pagegraph.compiler.explain.fusions import PassResult, run_passes
from pagegraph.compiler.explain.ledger import Ledger, Weights, ledger, planned_states, would_fit
from pagegraph.compiler.explain.machines import Machine, named_gpu, this_machine
from pagegraph.compiler.explain.predict import FITTED
from pagegraph.compiler.explain.roofline import StepFloor, buckets_of, is_decode, rows_of, step_floor, summed_bytes
from pagegraph.compiler.explain.trace import Traced, costs, trace
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.passes.registry import graph_passes
from pagegraph.compiler.profile.memory import StoredProfiles
from pagegraph.compiler.resolve import resolve_device
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.dummy import dummy_step
from pagegraph.kernels.attention import cpu_decode
from pagegraph.kernels.quant import cpu_int4
from pagegraph.runtime.config import Config, ConfigError, require_one_process
from pagegraph.runtime.engine.compiler_options import compiler_options

LENGTHS = (1024, 4096)  # tokens of the sequences that are counted, beside the longest
DEFAULT_CONTEXT = 1024
PROFILED = 3  # steps whose kernels are named: the smallest, one in the middle, the largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for beside the configuration."""

    gpu: str | None = None
    context: int | None = None
    every_size: bool = False
    quick: bool = False  # without the traced graph
    measure: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    memory: measure.MeasuredMemory
    steps: list[measure.MeasuredStep]


@dataclass(slots=True, kw_only=True)
class Explanation:
    """Of one configuration on one kind of device."""

    model: str
    machine: Machine
    gpus: int
    engines: int  # of a server, each of which takes the memory of `ledger` on each of its ranks
    summed_bytes: int  # a token: hidden states that ranks sum up
    dtype: str
    cache_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    context: int
    ledger: Ledger
    steps: list[StepFloor]
    passes: list[PassResult] | None = None  # None: not asked for
    advice: list[str] = field(default_factory=list)  # where it does not fit: settings with which it would
    measured: Measured | None = None

    def sequences(self) -> dict[int, int]:
        """Tokens -> how many sequences of so many the blocks hold."""
        longest = self.ledger.max_model_len
        return {n: self.ledger.sequences(n) for n in sorted({*(one for one in LENGTHS if one < longest), longest})}

    @property
    def all_bytes(self) -> int:
        """Of all ranks of all engines."""
        return self.ledger.allowed * self.gpus * self.engines

    @property
    def unfitted(self) -> list[str]:
        """What of this configuration the predicted times were not fitted to; with none of it they are more than an estimate."""
        quantised = any(
            dtype not in ("bfloat16", "float16", "float32") for dtype in (one.dtype for one in self.ledger.weights)
        )
        reasons = {
            f"{self.machine.name}": self.machine.name != FITTED,
            "several GPUs": self.gpus > 1,
            "quantised weights": quantised,
            f"weights in {self.dtype}": self.dtype == "float32",
            f"a KV cache in {self.cache_dtype}": self.cache_dtype != self.dtype,
            "recurrent layers": bool(self.ledger.slots),
        }
        return [name for name, holds in reasons.items() if holds]

    def measured_ms(self, step: StepFloor) -> float | None:
        """Of the step of this size, if it was run."""
        if self.measured is None:
            return None
        return next((m.ms for m in self.measured.steps if (m.tokens, m.seqs) == (step.tokens, step.seqs)), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values, bytes and seconds unless a name says otherwise."""
        found = asdict(self)
        held = self.ledger
        found["memory"] = found.pop("ledger") | {
            "weight_bytes": held.weight_bytes,
            "blocks": held.blocks,
            "loaded": held.loaded,
        }
        found["memory"].pop("machine")
        found["memory"].pop("gpus")
        found["memory"]["all_engines"] = self.all_bytes
        found["predicted_for"] = FITTED
        found["unfitted"] = self.unfitted
        found["sequences"] = {str(tokens): count for tokens, count in self.sequences().items()}
        found["steps"] = [
            asdict(one)
            | {
                "bound": one.bound,
                "floor_ms": 1e3 * one.floor_s,
                "predicted_ms": None if one.predicted_s is None else 1e3 * one.predicted_s,
                "measured_ms": self.measured_ms(one),
            }
            for one in self.steps
        ]
        return found


def explain(config: Config, asked: Asked, say: Callable[[str], None] = lambda line: None) -> Explanation:
    """Plan, and measure if that is asked for. `say` is told what takes long.

    Raises ConfigError for a question that does not go with the configuration, and what a start raises for files,
    settings and devices.
    """
    options, machine = _where(config, asked)
    models = plan_models(options)
    model = models[0]
    context = min(asked.context or DEFAULT_CONTEXT, model.max_model_len)
    if asked.context is not None and asked.context > model.max_model_len:
        raise ConfigError(
            f"--context {asked.context} is above max_model_len={model.max_model_len}; set it to that or less"
        )
    held = ledger(options, models, machine)
    traced = None
    if not asked.quick:
        say("tracing the model's graph")
        traced = _traced(options, models)
    buckets = buckets_of(options, asked.every_size)
    advice = []
    if held.refusal:
        say("looking for settings with which it fits")
        advice = would_fit(options, machine)
    found = Explanation(
        model=config.model_name,
        machine=machine,
        gpus=options.ranks.size,
        engines=config.data_parallel_size,
        summed_bytes=sum(map(summed_bytes, models)),
        dtype=str(model.dtype).removeprefix("torch."),
        cache_dtype=str(model.cache_dtype).removeprefix("torch."),
        max_num_seqs=options.step.max_num_seqs,
        max_num_batched_tokens=options.step.max_num_batched_tokens,
        context=context,
        ledger=held,
        steps=_floors(options, models, traced, buckets, context, machine),
        passes=None if traced is None else _passes(options, traced),
        advice=advice,
    )
    if asked.measure and not held.refusal:
        say("building the model")
        found.measured = _measured(options, buckets, context)
    return found


def _where(config: Config, asked: Asked) -> tuple[CompilerOptions, Machine]:
    """Options and the device they are for: one of the table, or this machine's."""
    if asked.gpu is not None:
        if asked.measure:
            raise ConfigError("--measure runs on this machine; leave --gpu out, or --measure")
        try:
            machine = named_gpu(asked.gpu)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return compiler_options(config, torch.device("cuda"), machine.capability), machine
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda, but torch sees no GPU here; name one that is meant, such as --gpu h200, or set device to cpu"
        )
    if asked.measure:
        require_one_process(config, "--measure")
    options = compiler_options(config, resolve_device(config.device))  # fewer GPUs than ranks will do to plan
    sharers = options.ranks.size * (config.data_parallel_size if options.device.type == "cpu" else 1)
    return options, this_machine(options.device).shared_by(sharers)


def _traced(options: CompilerOptions, models: list[LoadedModel]) -> Traced:
    """The graphs that the engine compiles."""
    [state, *_] = planned_states(options, models)
    if options.device.type == "cpu":  # a pass takes attention for what is there
        cpu_decode.build()
        cpu_int4.build()
    steps, passes = warm_steps(state), graph_passes(options.passes, options.device)
    if options.device.type == "cpu":
        steps, passes = [dummy_step([1], state.dummy_slot), *steps], []  # a prediction is made for GPUs alone
    return trace(models[0].paged_model, state, steps, passes)


def _floors(
    options: CompilerOptions,
    models: list[LoadedModel],
    traced: Traced | None,
    buckets: list[Bucket],
    context: int,
    machine: Machine,
) -> list[StepFloor]:
    model = models[0]
    [state, *_] = planned_states(options, models)
    found = []
    for bucket in buckets:
        rows = rows_of(bucket, context)
        if traced is None:
            totals, calls = costs(model.paged_model, model.paged_model, state, rows, bucket.seqs)[0], None
        else:
            totals, calls = traced.costs(rows, bucket.seqs)
        found.append(step_floor(model, totals, bucket, context, machine, calls))
    return found


def _passes(options: CompilerOptions, traced: Traced) -> list[PassResult]:
    """On a CPU of the graph of a single token: of larger steps all is left to the compiler."""
    return run_passes(traced.graphs[0], graph_passes(options.passes, options.device))


def _measured(options: CompilerOptions, buckets: list[Bucket], context: int) -> Measured:
    before = measure.resident(options.device)
    built = build_compiled(options, progress=False)
    try:
        profiles = StoredProfiles(built.start_cache, asdict(options.step)).read() if built.start_cache else None
        memory = measure.measured_memory(built, before, profiles or ())
        looked_at = {buckets[at * (len(buckets) - 1) // (PROFILED - 1)] for at in range(PROFILED)}
        steps = measure.measured_steps(built.step, buckets, context, built.num_blocks, looked_at)
    finally:
        built.close()
    return Measured(memory, steps)


def by_kind(weights: list[Weights]) -> list[Weights]:
    """Those of one kind and type together."""
    found: dict[tuple[str, str], Weights] = {}
    for one in weights:
        known = found.get((one.kind, one.dtype))
        found[one.kind, one.dtype] = Weights(one.kind, one.dtype, one.bytes + (known.bytes if known else 0))
    return list(found.values())


__all__ = ["Asked", "Explanation", "by_kind", "explain", "is_decode"]
