"""Turns what the engine does into what `runtime.metrics` counts: knows times of requests, not names of metrics."""

from __future__ import annotations

from dataclasses import dataclass

from compiler.step import StepCounts
from runtime.metrics import EngineMetrics
from runtime.protocol import TokenDelta
from runtime.request import Sequence
from runtime.scheduler import Counters, Plan, Scheduler


@dataclass(slots=True)
class _Times:
    """One live request, in seconds of the engine's clock."""

    arrival: float
    num_prompt: int
    last_token: float | None = None
    scheduled: bool = False
    num_generated: int = 0


class Recorder:
    """Follows requests from submission to end."""

    def __init__(self, metrics: EngineMetrics, scheduler: Scheduler, steps: StepCounts) -> None:
        self.metrics = metrics
        self.scheduler = scheduler
        self.steps = steps
        self._live: dict[str, _Times] = {}
        self._seen = Counters()

    def submitted(self, sequence: Sequence, now: float) -> None:
        """A sequence joined the queue."""
        self._live[sequence.request_id] = _Times(now, sequence.num_prompt)

    def ended(self, request_id: str, reason: str, now: float) -> None:
        """A sequence ended for `reason`; a second end of the same id is ignored."""
        times = self._live.pop(request_id, None)
        if times is not None:
            self.metrics.observe_finished(
                reason,
                since_arrival=now - times.arrival,
                prompt_tokens=times.num_prompt,
                generation_tokens=times.num_generated,
            )

    def launched(self, plan: Plan, now: float) -> None:
        """A step is on its way: the first of some sequences."""
        for entry in plan:
            times = self._live.get(entry.sequence.request_id)
            if times is not None and not times.scheduled:
                times.scheduled = True
                self.metrics.observe_scheduled(now - times.arrival)

    def stepped(self, deltas: list[TokenDelta], now: float) -> None:
        """A step's tokens are on the host."""
        for delta in deltas:
            self._token(delta, now)
            if delta.finish_reason:
                self.ended(delta.request_id, delta.finish_reason, now)
        self.publish()

    def publish(self) -> None:
        """Gauges of the moment, and what the scheduler's counters gained since the last call."""
        now, before = self.scheduler.counters, self._seen
        self.metrics.observe_step(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            kv_cache_usage=self.scheduler.pool.usage,
            prompt_tokens=now.prompt_tokens - before.prompt_tokens,
            generation_tokens=now.generated_tokens - before.generated_tokens,
            prefix_queries=now.prefix_queries - before.prefix_queries,
            prefix_hits=now.prefix_hits - before.prefix_hits,
            preemptions=now.preemptions - before.preemptions,
        )
        self._seen = now.copy()
        steps = self.steps
        self.metrics.set_launched(
            steps=steps.steps, graphed=steps.graphed, tokens=steps.tokens, padding=steps.padding
        )

    def _token(self, delta: TokenDelta, now: float) -> None:
        times = self._live.get(delta.request_id)
        if times is None or not delta.token_ids:
            return
        if times.last_token is None:
            self.metrics.observe_first_token(now - times.arrival)
        else:
            self.metrics.observe_inter_token((now - times.last_token) / len(delta.token_ids), len(delta.token_ids))
        times.last_token = now
        times.num_generated += len(delta.token_ids)
