"""Measures configurations: builds a model where the one that is there does not do, and runs the workload through it.

One model is held at a time. It serves every configuration that differs in scheduling alone, as long as its steps are no
larger than those it was built for. Knows no search.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pagegraph.compiler.build import BuiltModel, build_model
from pagegraph.compiler.explain.measure import measured_memory
from pagegraph.compiler.host import step_thread
from pagegraph.compiler.options import CompilerOptions, StepOptions
from pagegraph.runtime.bench import measures
from pagegraph.runtime.bench.work import Request
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.assemble import engine_of
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LocalMailbox
from pagegraph.runtime.server.start_errors import sentence
from pagegraph.runtime.spec_decode.proposer import NgramProposer
from pagegraph.runtime.tune.knobs import ROOM
from pagegraph.runtime.tune.load import Load
from pagegraph.runtime.tune.measurement import PERCENTILES, CannotRun, Measurement, Objective, OutOfTime, TooSlow

UNLIMITED = 1 << 30  # requests in the queue
WARM_OUTPUT = 8  # tokens at most, of each request that warms an engine up
COLD = 6.0  # times a start with compiled code at hand, that one takes without (docs/bench.md: 138 s for 23 s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests with ids for prompts, seconds of their arrivals, and others of the same kind to warm up with."""

    requests: Sequence[Request]
    times: Sequence[float]
    warmups: Sequence[Request]
    ignore_eos: bool


class Engines:
    """`deadline`: on `time.monotonic`. `tick`: called while a run lasts."""

    def __init__(
        self,
        workload: Workload,
        objective: Objective,
        deadline: float,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self.workload = workload
        self._objective = objective
        self._deadline = deadline
        self._tick = tick
        self._built: BuiltModel | None = None
        self._options: CompilerOptions | None = None
        self.threads = torch.get_num_threads()  # as PyTorch chooses
        self._run_s = 0.0  # of the last run, with its warm-up
        self._start_s = 0.0  # of the last start whose compiled code was at hand, or that compiled nothing
        self._compile_s = 0.0  # of the last compilation

    def has_model(self, config: Config) -> bool:
        """See `Bench`."""
        return self._options is not None and _serves(self._options, compiler_options(config))

    def measure(self, config: Config, limit_s: float | None) -> Measurement:
        """See `Bench`."""
        if time.monotonic() + self._run_s > self._deadline:
            raise OutOfTime
        built = self._model(config)
        started = time.monotonic()
        load = self._run(config, built, self.workload.requests, self.workload.times, limit_s)
        self._run_s = time.monotonic() - started
        figures = measures.figures(
            load.outcomes, load.duration, percentiles=PERCENTILES, slos=self._objective.slos or None
        )
        memory = measured_memory(built, 0)
        ngram = NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max)
        return Measurement(figures, load.counts(ngram), memory.weight_bytes + memory.blocks)

    def alone(self, config: Config, request: Request, times: int) -> dict[str, float]:
        """Milliseconds by metric of this one request with nothing beside it, the least of so many runs."""
        built = self._model(config)
        outcomes = [self._run(config, built, [request], [0.0], None).outcomes[0] for _ in range(times)]
        return {name: min(measures.judged_ms(one, name) for one in outcomes) for name in measures.METRICS}

    def close(self) -> None:
        """Finish what is launched and free the model."""
        if self._built is not None:
            self._built.close()
        self._built = self._options = None
        self._use_threads(self.threads)
        gc.collect()
        torch._dynamo.reset()  # or it counts the next model's graphs as ones of this
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(
        self,
        config: Config,
        built: BuiltModel,
        requests: Sequence[Request],
        times: Sequence[float],
        limit_s: float | None,
    ) -> Load:
        """Through an engine of its own, with nothing cached, that has done a few requests before."""
        warmups = [replace(one, output_len=min(one.output_len, WARM_OUTPUT)) for one in self.workload.warmups]
        mailbox = LocalMailbox()
        engine, metrics = engine_of(config, built, mailbox, max_queue=UNLIMITED)
        given = dict(ignore_eos=self.workload.ignore_eos)

        def watch(seconds: float) -> None:
            self._tick()
            if time.monotonic() > self._deadline:
                raise OutOfTime
            if limit_s is not None and seconds > limit_s:
                raise TooSlow

        Load(engine, metrics, mailbox, warmups, [0.0] * len(warmups), **given, watch=watch).run()
        gc.collect()
        load = Load(engine, metrics, mailbox, requests, times, **given, watch=watch)
        load.run()
        return load

    def _model(self, config: Config) -> BuiltModel:
        """A model that serves `config`: the one that is there, or a new one."""
        options = compiler_options(config)
        if self._built is not None and self._options is not None and _serves(self._options, options):
            return self._built
        self._expect(self._start_s)
        self.close()
        options = _with_room(options)
        self._use_threads(config.num_threads or self.threads)
        started = time.monotonic()
        try:
            built = build_model(options, progress=False)
            compiles = options.compile and not built.is_stored
            if compiles:
                self._expect(self._compile_s or COLD * self._start_s)
            if options.compile:
                built.compile()
            built.capture_graphs(progress=False)
        except OutOfTime:
            raise
        except Exception as error:
            if self._run_s == 0.0 or (reason := sentence(error)) is None:  # the baseline's own
                raise
            raise CannotRun(reason) from error
        took = time.monotonic() - started
        if compiles:
            self._compile_s = took
        self._start_s = self._start_s or (took / COLD if compiles else took)
        self._built, self._options = built, options
        return built

    @staticmethod
    def _use_threads(count: int) -> None:
        """A build sets what is configured; what is left to PyTorch, no build does."""
        torch.set_num_threads(count)
        step_thread.submit(torch.set_num_threads, count).result()

    def _expect(self, seconds: float) -> None:
        """Raise OutOfTime if so much and a run do not fit any more."""
        if time.monotonic() + seconds + self._run_s > self._deadline:
            raise OutOfTime


def _with_room(options: CompilerOptions) -> CompilerOptions:
    """With steps as large as will be tried, where that costs nothing: a GPU keeps memory for them."""
    if options.device.type != "cpu":
        return options
    step = options.step
    return dataclasses.replace(
        options,
        step=dataclasses.replace(
            step,
            max_num_seqs=ROOM * step.max_num_seqs,
            max_decode_tokens=ROOM * step.max_decode_tokens,
            max_num_batched_tokens=ROOM * step.max_num_batched_tokens,
        ),
    )


def _serves(built: CompilerOptions, wanted: CompilerOptions) -> bool:
    """Whether a model of these options runs the wanted ones, as `LLM(config, built=...)` may."""

    def sizes(step: StepOptions) -> tuple[int, int, int]:
        return step.max_num_seqs, step.max_decode_tokens, step.max_num_batched_tokens

    alike = dataclasses.replace(
        wanted,
        step=dataclasses.replace(built.step, max_draft_tokens=wanted.step.max_draft_tokens, ngram=wanted.step.ngram),
    )
    return alike == built and all(ours <= theirs for ours, theirs in zip(sizes(wanted.step), sizes(built.step)))
