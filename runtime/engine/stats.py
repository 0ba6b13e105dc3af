"""Turns what the engine does into what `runtime.engine.metrics` counts: knows times of requests, not names of metrics."""

from __future__ import annotations

import logging

import numpy as np

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.runtime.engine.metrics import EngineMetrics
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence

log = logging.getLogger("pagegraph.engine")

REPORT_S = 60.0  # between two lines about draft tokens


class EngineStats:
    """Follows requests from submission to end. Times are seconds of the engine's clock."""

    def __init__(self, metrics: EngineMetrics, scheduler: Scheduler, steps: StepCounts) -> None:
        self.metrics = metrics
        self.scheduler = scheduler
        self.steps = steps
        self._tokens = 0  # counted so far
        self._reported = (
            0.0,
            0,
            0,
        )  # when the last line about draft tokens was written, draft tokens and accepted ones then
        metrics.refresh = self.publish

    def ended(self, sequence: Sequence, now: float) -> None:
        """A sequence ended, for its `finish_reason`."""
        self.metrics.observe_finished(sequence.finish_reason)
        if sequence.finish_reason in ("stop", "length") and sequence.num_generated:
            self.metrics.observe_served(
                queue_time=sequence.launched_at - sequence.arrival,
                prefill_time=sequence.first_token_at - sequence.launched_at,
                decode_time=now - sequence.first_token_at,
                since_arrival=now - sequence.arrival,
                prompt_tokens=sequence.num_prompt,
                generation_tokens=sequence.num_generated,
            )

    def launched(self, plan: Plan, now: float) -> None:
        """A step is on its way: the first of some sequences."""
        for sequence in plan.started:
            if not sequence.num_preemptions:
                sequence.launched_at = now

    def stepped(self, result: StepResult, now: float) -> None:
        """A step's tokens are on the host."""
        batch = self.scheduler.batch
        before = batch.last_token_at[result.slots]
        first = np.isnan(before)
        if first.any():
            for since_arrival in (now - batch.arrival[result.slots[first]]).tolist():
                self.metrics.observe_first_token(since_arrival)
            before = before[~first]
        self.metrics.observe_inter_tokens(now - before)
        batch.last_token_at[result.slots] = now
        for sequence in result.begun:
            sequence.first_token_at = now
        for sequence in result.ended:
            self.ended(sequence, now)
        counters = self.scheduler.counters
        tokens = counters.prompt_tokens - counters.cached_tokens + counters.generated_tokens
        self.metrics.observe_step(tokens - self._tokens)
        self._tokens = tokens
        if result.verification is not None:
            self._report_acceptance(now)

    def _report_acceptance(self, now: float) -> None:
        counters, (then, draft_tokens, accepted) = self.scheduler.counters, self._reported
        if now - then < REPORT_S:
            return
        self._reported = now, counters.draft_tokens, counters.accepted
        if new := counters.draft_tokens - draft_tokens:
            held = counters.accepted - accepted
            log.info("speculation: %d of %d draft tokens were accepted (%.0f %%)", held, new, 100 * held / new)

    def publish(self) -> None:
        """What is read off the scheduler and the step when somebody asks."""
        counters, steps = self.scheduler.counters, self.steps
        self.metrics.set_state(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            kv_cache_usage=self.scheduler.block_tables.pool.usage,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generation_tokens=counters.generated_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
        )
        self.metrics.set_speculation(
            drafts=counters.drafts,
            draft_tokens=counters.draft_tokens,
            accepted=counters.accepted,
            accepted_at=counters.accepted_at,
            saved_steps=counters.saved_steps,
            mean_draft_tokens=counters.mean_draft_tokens,
        )
        self.metrics.set_launched(steps=steps.steps, graphed=steps.graphed, tokens=steps.tokens, padding=steps.padding)
