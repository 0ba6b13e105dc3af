"""A scheduler on a simulated clock: steps take what a formula says, and nothing is computed.

The formula is of an 8B on an H200, as measured: it reads weights for a while whatever it computes, is bound by arithmetic
beyond some hundred tokens, and pays for prompts in a step at all, more so deep in a long one. Steps are launched one ahead of their results, as in the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pagegraph.compiler.step.inputs import StepOutput
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.chunk_limit import ChunkLimit
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.step_time import StepLoad, StepTime

MAX_LEN = 120_000


@dataclass(frozen=True)
class Job:
    """A request: when it comes in ms, and how long it is."""

    at: float
    prompt: int
    output: int


@dataclass
class Outcome:
    """Milliseconds; lists by job."""

    wall: float = 0.0
    first: list[float] = field(default_factory=list)  # from arrival to the first token
    gaps: list[list[float]] = field(default_factory=list)  # between a job's tokens
    steps: list[StepLoad] = field(default_factory=list)

    def all_gaps(self, jobs: range | None = None) -> np.ndarray:
        return np.concatenate([self.gaps[job] for job in jobs or range(len(self.gaps))])


def step_ms(plan: Plan) -> float:
    load = StepLoad.of(plan)
    decoding = plan.counts == 1
    linear = max(4.0 + 0.015 * plan.num_tokens, 0.0225 * plan.num_tokens)
    prompts = 1.5 + 0.9e-6 * max(load.prompt_tokens, 140) * load.depth if load.prompt_tokens else 0.0
    return linear + 3e-5 * float(plan.starts[decoding].sum()) + prompts


def simulate(jobs: list[Job], limit: ChunkLimit | None, *, max_num_seqs: int = 256, budget: int = 8192) -> Outcome:
    """All jobs, in order of arrival, to their end."""
    scheduler = Scheduler(
        BlockPool(30_000, 16, False), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget,
        max_model_len=MAX_LEN, chunk_limit=limit,
    )  # fmt: skip
    outcome = Outcome(first=[0.0] * len(jobs), gaps=[[] for _ in jobs])
    last: dict[int, float] = {}
    now, added, flight = 0.0, 0, None  # flight: (plan, when it is done, what it takes)
    while added < len(jobs) or scheduler.has_work or flight:
        while added < len(jobs) and jobs[added].at <= now:
            scheduler.add(sequence(added, jobs[added]))
            added += 1
        plan = scheduler.schedule()
        if plan is None and flight is None:
            now = jobs[added].at
            continue
        launched = None
        if plan is not None:
            begin, ms = flight[1] if flight else now, step_ms(plan)
            launched = plan, begin + ms, ms
            outcome.steps.append(StepLoad.of(plan))
        if flight:
            done, now, ms = flight
            if limit is not None:
                limit.step_time.observe(StepLoad.of(done), ms)
            result = scheduler.commit(done, StepOutput(np.zeros(len(done), np.int32)))
            for job in map(int, result.request_ids):
                if job in last:
                    outcome.gaps[job].append(now - last[job])
                else:
                    outcome.first[job] = now - jobs[job].at
                last[job] = now
            scheduler.finish(result)
        flight = launched
    scheduler.check_integrity()
    outcome.wall = now
    return outcome


def sequence(index: int, job: Job) -> Sequence:
    params = SamplingParams(max_tokens=job.output, ignore_eos=True)
    return Sequence(str(index), np.zeros(job.prompt, np.int32), params, frozenset(), 0, MAX_LEN, arrival=job.at)


def learnt(target_ms: float | None = None) -> ChunkLimit:
    """A limit that has seen some steps of a server."""
    limit = ChunkLimit(StepTime(), target_ms, least=256)
    simulate([Job(0, 300, 60)] * 8 + [Job(200, 1000, 60)] * 3, limit)
    return limit
