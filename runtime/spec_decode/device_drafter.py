"""Decides how many draft tokens each slot gets where the device proposes them: each step runs the n-gram proposer for
the next.

A step that verifies is launched before the one before it is done: the device knows where its slots stand and which
tokens it proposed (`kernels.spec_decode.ngram`). The host says how many draft tokens a slot gets, from what it knows by
then, a step late: how long a match the slot's draft tokens rested on, and how often draft tokens on such a match have
been accepted. Knows no device and no text.
"""

from __future__ import annotations

import numpy as np

from pagegraph.compiler.step.inputs import NgramOutput
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.spec_decode.drafter import KEEP_DRAFTING, START_DRAFTING, could_pay, within
from pagegraph.runtime.spec_decode.num_draft_tokens import Acceptance, StepCosts, choose

KEPT = 4  # steps for which numbers of draft tokens are kept while the same slots may have them
# One of so many steps without draft tokens is observed: its time, and whether its draft tokens would have been
# accepted.
OBSERVE_EVERY = 8


class DeviceDrafter:
    """Drafts at most `most` tokens a slot for every step; with `costs`, as many of them as pay. See
    `runtime.spec_decode.drafter.Drafter`.
    """

    def __init__(self, scheduler: Scheduler, most: int, costs: StepCosts | None = None) -> None:
        self.scheduler = scheduler
        self.most = most
        self.costs = costs
        self.acceptance = Acceptance(scheduler.max_num_seqs)
        self._epochs = np.zeros(scheduler.max_num_seqs, np.int64)  # of the sequence that the next is of
        self._matched = np.zeros(
            scheduler.max_num_seqs, np.int32
        )  # what the slot's next draft tokens rest on, 0: on nothing
        self._chosen: tuple[np.ndarray, np.ndarray] | None = None  # slots, and numbers of draft tokens that pay
        self._drafting = False  # whether the last step had draft tokens
        self._steps = 0

    def wants_results(self, running: Plan) -> bool:
        """Never: the device has what it needs."""
        return False

    def propose(self, ahead: bool) -> DraftTokens | None:
        """For slots whose last text that the host has heard of was a repetition."""
        counters, scheduler = self.scheduler.counters, self.scheduler
        drafting, self._drafting, counters.mean_draft_tokens = self._drafting, False, 0.0
        if not self._matched.any():
            return None
        slots, limits, budget = scheduler.room_for_drafts(self.most, lag=None)
        matching = (self._matched[slots] > 0) & (self._epochs[slots] == scheduler.batch.epoch[slots])
        slots, limits = slots[matching], limits[matching]
        if not len(slots) or not budget:
            return None
        if self.costs is None:
            counts = within(limits, budget)
        else:
            counts = self._paying(slots, limits, budget, drafting)
        some = counts > 0
        if not some.any():
            return None
        self._drafting, counters.mean_draft_tokens = True, float(counts[some].mean())
        return DraftTokens(slots[some], counts[some], None)

    def learn(
        self, plan: Plan, result: StepResult, ngram: NgramOutput | None, step_ms: float, overhead_ms: float
    ) -> None:
        """See `runtime.spec_decode.drafter.Drafter`."""
        assert ngram is not None
        self._steps += 1
        observed = plan.drafts is not None or self._steps % OBSERVE_EVERY == 0
        if self.costs is not None and observed and plan.num_tokens == len(plan):
            self.costs.observe(len(plan), step_ms)
        if plan.drafts is None and not ngram.matched.any() and not self._matched.any():
            return  # nothing repeats: the usual step costs nothing more
        if (verification := result.verification) is not None and len(verification.slots):
            assert plan.drafts is not None
            at = verification.slots
            epochs = plan.epochs[plan.drafts.first[np.isin(plan.drafts.slots, at)]]
            self.acceptance.learn(at, epochs, self._matched[at], verification.counts, verification.accepted)
        elif observed and self.costs is not None and ngram.hits is not None:
            self._learn_unverified(plan, ngram.hits)
        at, epochs, matched = plan.slots, plan.epochs, ngram.matched
        if plan.drafts is not None:
            first = np.append(True, at[1:] != at[:-1])
            at, epochs, matched = at[first], epochs[first], matched[first]
        self._epochs[at], self._matched[at] = epochs, matched
        if result.ended:
            self._matched[at[self.scheduler.batch.epoch[at] != epochs]] = 0

    def _learn_unverified(self, plan: Plan, hits: np.ndarray) -> None:
        """Of slots that were not given their draft tokens: whether the first would have been accepted."""
        asked = plan.sampled & (self._matched[plan.slots] > 0) & (self._epochs[plan.slots] == plan.epochs)
        if self.scheduler.num_running < self.scheduler.max_decode_tokens and asked.any():
            slots = plan.slots[asked]
            self.acceptance.learn(
                slots, plan.epochs[asked], self._matched[slots], np.ones(len(slots), np.int32), hits[asked]
            )

    def _paying(self, slots: np.ndarray, limits: np.ndarray, budget: int, drafting: bool) -> np.ndarray:
        """Numbers of draft tokens: those of the last step while they may stand, else what pays now."""
        kept = self._chosen if drafting and self._steps % KEPT else None
        if kept is not None and np.array_equal(kept[0], slots) and kept[1].sum() <= budget:
            return np.minimum(kept[1], limits)
        assert self.costs is not None
        base = self.scheduler.num_running
        counts = np.zeros(len(slots), np.int32)
        if could_pay(base, budget, self.costs):
            chances = self.acceptance.chances(slots, self.scheduler.batch.epoch[slots], self._matched[slots], self.most)
            counts = choose(
                chances, limits, base, budget, self.costs, 0.0, KEEP_DRAFTING if drafting else START_DRAFTING
            ).counts
        self._chosen = slots, counts
        return counts
