"""Draft tokens of sequences with grammars: what another drafter proposes is cut where the grammar forbids it, and where
the grammar leaves no choice, its own continuation is drafted.

Forced tokens are right but for an exception, so they cost their place in the step and nothing else. They are drafted
also while a step is in flight, if that step is sure to sample the first of them; then the others follow. What the other
drafter learns from is its own draft tokens alone. Knows no device; how a grammar is matched is `runtime.grammar`'s.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from pagegraph.compiler.step.inputs import NgramOutput
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.spec_decode.drafter import Drafter

log = logging.getLogger("pagegraph.engine")


class GrammarDrafter:
    """`inner` drafts for the others; at most `most` tokens a slot. See `runtime.spec_decode.drafter.Drafter`."""

    def __init__(self, scheduler: Scheduler, inner: Drafter, most: int) -> None:
        self.scheduler = scheduler
        self.inner = inner
        self.most = most

    def wants_results(self, running: Plan) -> bool:
        """See `Drafter`."""
        return self.inner.wants_results(running)

    def propose(self, ahead: bool) -> DraftTokens | None:
        """See `Drafter`."""
        drafts = self.inner.propose(ahead)
        batch = self.scheduler.batch
        if not batch.sampling.has_grammar[batch.epoch > 0].any():
            return drafts
        rows = {} if drafts is None else self._allowed(drafts)
        forced = self._forced(ahead, sum(map(len, rows.values())))
        # Those of a match may be more than are forced.
        forced = {slot: tokens for slot, tokens in forced.items() if len(tokens) > len(rows.get(slot, ()))}
        return _drafts_of(rows | forced, set(forced))

    def learn(
        self, plan: Plan, result: StepResult, ngram: NgramOutput | None, step_ms: float, overhead_ms: float
    ) -> None:
        """See `Drafter`."""
        found = result.verification
        if found is not None and plan.drafts is not None and plan.drafts.forced is not None:
            own = ~np.isin(found.slots, plan.drafts.slots[plan.drafts.forced])
            own_found = replace(
                found,
                slots=found.slots[own],
                counts=found.counts[own],
                accepted=found.accepted[own],
                tokens=found.tokens[own],
                lengths=found.lengths[own],
                stopped=found.stopped[own],
            )
            result = replace(result, verification=own_found)
        self.inner.learn(plan, result, ngram, step_ms, overhead_ms)

    def _allowed(self, drafts: DraftTokens) -> dict[int, list[int]]:
        """The draft tokens of each slot, as far as its grammar has them."""
        tokens = drafts.tokens
        if tokens is None:
            tokens = np.broadcast_to(
                np.arange(-2, -2 - int(drafts.counts.max()), -1), (len(drafts.slots), drafts.counts.max())
            )
        rows = {}
        for slot, count, row in zip(drafts.slots.tolist(), drafts.counts.tolist(), tokens):
            proposed = row[:count].tolist()
            if self.scheduler.batch.sampling.has_grammar[slot]:
                proposed = proposed[: self._admitted(slot, proposed)]
            if proposed:
                rows[slot] = proposed
        return rows

    def _forced(self, ahead: bool, taken: int) -> dict[int, list[int]]:
        """Tokens that have to follow in each slot; `taken`: draft tokens that the step has already."""
        batch = self.scheduler.batch
        slots, limits, budget = self.scheduler.room_for_drafts(self.most, lag=int(ahead))
        masked = batch.sampling.has_grammar[slots]
        rows = {}
        for slot, limit in zip(slots[masked].tolist(), limits[masked].tolist()):
            in_flight = int(batch.total[slot] - batch.known[slot])
            limit = min(limit, budget - taken)
            tokens = self._forced_in(slot, in_flight + limit)[in_flight:]
            if tokens and limit > 0:
                rows[slot] = tokens
                taken += len(tokens)
        return rows

    def _forced_in(self, slot: int, most: int) -> list[int]:
        """Tokens that have to follow what is committed."""
        matcher = self.scheduler.batch.sequences[slot].grammar
        try:
            tokens = matcher.forced()[:most]
            return tokens[: self._admitted(slot, tokens)]
        except Exception:
            log.exception("a grammar raised an exception: nothing is drafted for it")
            return []

    def _admitted(self, slot: int, tokens: list[int]) -> int:
        """How many of these the slot's grammar has behind what is committed."""
        batch = self.scheduler.batch
        sequence = batch.sequences[slot]
        # Who must not sample the end may be at it within draft tokens, which only the last of a step's is tried for.
        if sequence.params.ignore_eos or sequence.grammar.num_tokens != batch.known[slot] - sequence.num_prompt:
            return 0
        try:
            return sequence.grammar.admits(tokens)
        except Exception:
            log.exception("a grammar raised an exception: nothing is drafted for it")
            return 0


def _drafts_of(rows: dict[int, list[int]], forced: set[int]) -> DraftTokens | None:
    if not rows:
        return None
    counts = np.array([len(tokens) for tokens in rows.values()], np.int32)
    tokens = np.zeros((len(rows), int(counts.max())), np.int32)
    for row, values in zip(tokens, rows.values(), strict=True):
        row[: len(values)] = values
    own = np.array([slot in forced for slot in rows])
    return DraftTokens(np.array(list(rows), np.int32), counts, tokens, own if own.any() else None)
