"""Turns what the engine does into what `runtime.metrics` counts: knows times of requests, not names of metrics."""

from __future__ import annotations

import numpy as np

from compiler.step import StepCounts
from runtime.metrics import EngineMetrics
from runtime.request import Sequence
from runtime.scheduler import Arrived, Counters, Plan, Scheduler


class Recorder:
    """Follows requests from submission to end. Times are seconds of the engine's clock."""

    def __init__(self, metrics: EngineMetrics, scheduler: Scheduler, steps: StepCounts) -> None:
        self.metrics = metrics
        self.scheduler = scheduler
        self.steps = steps
        self._seen = (0, 0, 0, 0, 0)

    def ended(self, sequence: Sequence, now: float) -> None:
        """A sequence ended, for its `finish_reason`."""
        self.metrics.observe_finished(
            sequence.finish_reason,
            since_arrival=now - sequence.arrival,
            prompt_tokens=sequence.num_prompt,
            generation_tokens=sequence.num_generated,
        )

    def launched(self, plan: Plan, now: float) -> None:
        """A step is on its way: the first of some sequences."""
        for sequence in plan.started:
            if not sequence.num_preemptions:
                self.metrics.observe_scheduled(now - sequence.arrival)

    def stepped(self, arrived: Arrived, now: float) -> None:
        """A step's tokens are on the host."""
        rows = self.scheduler.rows
        before = rows.last_token_at[arrived.rows]
        first = np.isnan(before)
        if first.any():
            for since_arrival in (now - rows.arrival[arrived.rows[first]]).tolist():
                self.metrics.observe_first_token(since_arrival)
            before = before[~first]
        self.metrics.observe_inter_tokens(now - before)
        rows.last_token_at[arrived.rows] = now
        for sequence in arrived.ended:
            self.ended(sequence, now)
        self.publish()

    def publish(self) -> None:
        """Gauges of the moment, and what the scheduler's counters gained since the last call."""
        now, before = _totals(self.scheduler.counters), self._seen
        prompt, generation, queries, hits, preemptions = (mine - seen for mine, seen in zip(now, before))
        self.metrics.observe_step(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            kv_cache_usage=self.scheduler.pool.usage,
            prompt_tokens=prompt,
            generation_tokens=generation,
            prefix_queries=queries,
            prefix_hits=hits,
            preemptions=preemptions,
        )
        self._seen = now
        steps = self.steps
        self.metrics.set_launched(
            steps=steps.steps, graphed=steps.graphed, tokens=steps.tokens, padding=steps.padding
        )


def _totals(counters: Counters) -> tuple[int, int, int, int, int]:
    c = counters
    return c.prompt_tokens, c.generated_tokens, c.prefix_queries, c.prefix_hits, c.preemptions
