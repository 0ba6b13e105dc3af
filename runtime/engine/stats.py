"""Engine stats: follows requests and steps, and hands `runtime.engine.metrics` their times. Knows no names of metrics."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.runtime.engine.metrics import Counts, EngineMetrics
from pagegraph.runtime.engine.status_line import StatusLine
from pagegraph.runtime.ipc.protocol import Timeline
from pagegraph.runtime.scheduler.chunk_limit import ChunkCounts
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence

log = logging.getLogger("pagegraph.engine")

MOST_RECENT = 200  # sequences that ended, which are remembered
REPORT_S = 60.0  # between two lines about draft tokens


@dataclass(frozen=True, slots=True)
class Reported:
    """When the last line about draft tokens was written, and the totals that it was about."""

    at: float = 0.0  # seconds of the engine's clock
    draft_tokens: int = 0
    accepted: int = 0


class EngineStats:
    """Follows requests from submission to end. Times are seconds of the engine's clock."""

    def __init__(
        self, metrics: EngineMetrics, scheduler: Scheduler, steps: StepCounts, log_stats_interval_s: float = 0.0
    ) -> None:
        self.metrics = metrics
        self.scheduler = scheduler
        self.steps = steps
        self._tokens = 0  # counted so far
        self._reported = Reported()
        self._recent: deque[tuple[str, Timeline]] = deque(maxlen=MOST_RECENT)  # with whose each was
        self._traced: list[tuple[int, Timeline]] = []  # with the owner of each
        metrics.counts = self.counts
        self.status_line = StatusLine(log_stats_interval_s, self.counts)

    def ended(self, sequence: Sequence, now: float) -> None:
        """A sequence ended, for its `finish_reason`."""
        self.metrics.observe_finished(sequence.finish_reason)
        timeline = Timeline(
            label=sequence.label,
            trace=sequence.trace,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.cached_tokens,
            cache_miss=sequence.cache_miss,
            generated_tokens=sequence.num_generated,
            finish_reason=sequence.finish_reason,
            arrival=sequence.arrival,
            launched=sequence.times.launched,
            first_token=sequence.times.first_token,
            ended=now,
        )
        self._recent.append((sequence.asker, timeline))
        if sequence.trace:
            self._traced.append((sequence.owner, timeline))
        if sequence.finish_reason in ("stop", "length") and not np.isnan(sequence.times.first_token):
            self.metrics.observe_served(
                queue_time=sequence.times.launched - sequence.arrival,
                prefill_time=sequence.times.first_token - sequence.times.launched,
                decode_time=now - sequence.times.first_token,
                since_arrival=now - sequence.arrival,
                prompt_tokens=sequence.num_prompt,
                generation_tokens=sequence.num_generated,
                max_tokens=sequence.max_len - sequence.num_prompt,
            )
            if sequence.samples.served(sequence.num_generated):
                self.metrics.observe_samples(sequence.samples.count, sequence.samples.most_tokens)

    def recent(self, asker: str) -> list[Timeline]:
        """Of the last sequences that ended, those of one asker, the newest last."""
        return [timeline for whose, timeline in self._recent if whose == asker]

    def take_traced(self) -> list[tuple[int, Timeline]]:
        """The owners of sequences with a trace that ended since this was asked last, and what became of each."""
        traced, self._traced = self._traced, []
        return traced

    def launched(self, plan: Plan, now: float) -> None:
        """A step is on its way: the first of some sequences."""
        for sequence in plan.started:
            if not sequence.num_preemptions:
                sequence.times.launched = now

    def stepped(self, result: StepResult, now: float) -> None:
        """A step's tokens are on the host."""
        times = self.scheduler.batch.times
        before = times.last_token[result.slots]
        first = np.isnan(before)
        if first.any():
            for since_arrival in (now - times.arrival[result.slots[first]]).tolist():
                self.metrics.observe_first_token(since_arrival)
            before = before[~first]
        self.metrics.observe_inter_tokens(now - before)
        times.last_token[result.slots] = now
        for sequence in result.begun:
            sequence.times.first_token = now
        for sequence in result.ended:
            self.ended(sequence, now)
        counters = self.scheduler.counters
        tokens = counters.prompt_tokens - counters.cached_tokens + counters.generated_tokens
        self.metrics.observe_step(tokens - self._tokens)
        self._tokens = tokens
        if result.verification is not None:
            self._report_acceptance(now)

    def counts(self) -> Counts:
        """What metrics read off the scheduler and the step."""
        scheduler, limit = self.scheduler, self.scheduler.chunk_limit
        return Counts(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=scheduler.block_tables.pool.usage,
            scheduled=replace(scheduler.counters),
            launched=self.steps,
            chunks=ChunkCounts() if limit is None else limit.counts,
        )

    def _report_acceptance(self, now: float) -> None:
        before, counters = self._reported, self.scheduler.counters
        if now - before.at < REPORT_S:
            return
        self._reported = Reported(now, counters.draft_tokens, counters.accepted)
        if verified := counters.draft_tokens - before.draft_tokens:
            accepted = counters.accepted - before.accepted
            share = 100 * accepted / verified
            log.info("speculation: %d of %d draft tokens were accepted (%.0f %%)", accepted, verified, share)
