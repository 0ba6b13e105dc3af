"""Decides when the host drafts, and how many tokens: between the engine loop, the scheduler and a proposer.

The proposer needs every token of a slot on the host, so the step in flight is committed before draft tokens are
proposed; all other steps are planned ahead as ever. Where the engine chooses the number of draft tokens, proposals are
compared with the tokens that come while nothing is drafted: measuring acceptance takes no step. Knows no device.

Splitting the batch into two alternating halves, so that only those wait who have draft tokens, would read the weights
twice; so all wait, and the wait is part of what draft tokens must earn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pagegraph.compiler.step.inputs import NgramOutput
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.spec_decode.drafter import KEEP_DRAFTING, START_DRAFTING, could_pay, within
from pagegraph.runtime.spec_decode.num_draft_tokens import Acceptance, StepCosts, choose
from pagegraph.runtime.spec_decode.proposer import Proposal, Proposer

SHADOW = 3  # draft tokens a slot that are compared with what comes instead of being verified
SEARCH_SHARE = 0.01  # share of time that searches for draft tokens may take while nothing is drafted
RATE = 0.1  # weight of a step in the averages here


@dataclass(slots=True)
class Shadow:
    """Draft tokens, from position `at` on, that are not verified but compared with what the sequence of that epoch
    gets.
    """

    epoch: int
    at: int
    matched: int
    tokens: np.ndarray


@dataclass(slots=True)
class Offer:
    """What could be drafted for slots[i]: limits[i] tokens, of the proposal where `retrieved`, else of a model."""

    slots: np.ndarray
    limits: np.ndarray
    proposal: Proposal
    retrieved: np.ndarray  # bool [R]
    chances: np.ndarray  # float64 [R, K]


class HostDrafter:
    """Drafts `most` tokens a slot for every step; with `costs`, as many of them as pay."""

    def __init__(
        self,
        scheduler: Scheduler,
        proposer: Proposer,
        most: int,
        costs: StepCosts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.proposer = proposer
        self.most = most
        self.costs = costs
        self.clock = clock
        self.acceptance = Acceptance(scheduler.max_num_seqs)
        self._matched = np.zeros(scheduler.max_num_seqs, np.int32)  # of the draft tokens in flight
        self._shadows: dict[int, Shadow] = {}  # by slot
        self._overhead_ms = 0.5  # from a step's results to the launch of one with draft tokens
        self._search_ms = 0.1  # what a search takes
        self._search_budget_ms = 0.0  # what searches may take
        self._drafting = False  # whether the last step that could have had draft tokens had any

    def wants_results(self, running: Plan) -> bool:
        """See `Drafter`."""
        if running.drafts is not None or self.costs is None:
            return True
        return self._would_draft(self.costs)

    def propose(self, ahead: bool) -> DraftTokens | None:
        """See `Drafter`; none while a step is in flight."""
        if ahead:
            return None
        counters = self.scheduler.counters
        drafting, self._drafting = self._drafting, False
        counters.mean_draft_tokens = 0.0
        slots, limits, budget = self.scheduler.room_for_drafts(self.most)
        if not len(slots) or not budget:
            return None
        offer = self._offer(slots, limits, 0)
        counts = self._counts(offer, budget, KEEP_DRAFTING if drafting else START_DRAFTING)
        some = np.flatnonzero(counts)
        if not len(some):
            return None
        tokens = self._tokens(offer, counts)
        self._matched[slots[some]] = np.where(offer.retrieved, offer.proposal.matched, 0)[some]
        self._drafting, counters.mean_draft_tokens = True, float(counts[some].mean())
        return DraftTokens(slots[some], counts[some], tokens[some])

    def learn(
        self, plan: Plan, result: StepResult, ngram: NgramOutput | None, step_ms: float, overhead_ms: float
    ) -> None:
        """See `Drafter`."""
        for sequence in result.ended:
            if not sequence.cache_salt:  # a salted one's tokens must not show in how fast others run
                self.proposer.ended(sequence.tokens[sequence.num_prompt :])
        if (verification := result.verification) is not None and len(verification.slots):
            assert plan.drafts is not None
            epochs = plan.epochs[plan.drafts.first[np.isin(plan.drafts.slots, verification.slots)]]
            self.acceptance.learn(
                verification.slots,
                epochs,
                self._matched[verification.slots],
                verification.counts,
                verification.accepted,
            )
            self._overhead_ms += RATE * (min(overhead_ms, 4 * self._overhead_ms) - self._overhead_ms)
        if self.costs is not None:
            if plan.num_tokens == len(plan):
                self.costs.observe(len(plan), step_ms)
            self._search_budget_ms = min(self._search_budget_ms + SEARCH_SHARE * step_ms, 2 * self._search_ms)

    def _offer(self, slots: np.ndarray, limits: np.ndarray, ahead: int) -> Offer:
        """What could be drafted for the slots; the first `ahead` tokens of a proposal are those in flight, and left
        out.
        """
        epochs = self.scheduler.batch.epoch[slots]
        proposal = self.proposer.propose(self.scheduler.batch, slots, limits)
        most = proposal.tokens.shape[1]
        chances = self.acceptance.chances(slots, epochs, proposal.matched, most)[:, ahead:]
        available = np.maximum(proposal.counts - ahead, 0)
        return Offer(slots, available, proposal, np.ones(len(slots), bool), chances)

    def _counts(self, offer: Offer, budget: int, margin: float) -> np.ndarray:
        """int32 [R], draft tokens for the slots of the offer, `budget` in all."""
        if self.costs is None:
            return within(offer.limits, budget)
        return self._paying(offer, self.costs, budget, margin)

    def _paying(self, offer: Offer, costs: StepCosts, budget: int, margin: float) -> np.ndarray:
        """How many of the offered draft tokens pay, by `margin` at least."""
        base = self.scheduler.num_running
        return choose(offer.chances, offer.limits, base, budget, costs, self._overhead_ms, margin).counts

    def _tokens(self, offer: Offer, counts: np.ndarray) -> np.ndarray:
        """int32 [R, K], of which counts [R] are wanted."""
        return offer.proposal.tokens

    def _would_draft(self, costs: StepCosts) -> bool:
        """Whether draft tokens would pay in the next step, seen from a token earlier; searches only as often as it may."""
        if self._search_budget_ms < self._search_ms:
            return False
        begin = self.clock()
        slots, limits, budget = self.scheduler.room_for_drafts(self.most, lag=1, takes_blocks=False)
        found = False
        if len(slots) and budget and could_pay(self.scheduler.num_running, budget, costs):
            offer = self._offer(slots, limits, 1)
            self._compare(slots, offer.proposal)
            found = bool(self._paying(offer, costs, budget, START_DRAFTING).any()) or self._worth_a_probe(offer, costs)
        spent = (self.clock() - begin) * 1e3
        self._search_ms += RATE * (min(spent, 4 * self._search_ms) - self._search_ms)
        self._search_budget_ms -= self._search_ms
        return found

    def _worth_a_probe(self, offer: Offer, costs: StepCosts) -> bool:
        """Whether draft tokens that are not expected to pay are tried: what a search proposes is compared for nothing."""
        return False

    def _compare(self, slots: np.ndarray, proposal: Proposal) -> None:
        """Learn from shadows whose tokens have come, and keep new ones."""
        batch = self.scheduler.batch
        learned: list[tuple[int, int, int, int, int]] = []  # slot, epoch, matched, draft tokens, accepted ones
        for i, slot in enumerate(slots.tolist()):
            shadow, epoch, known = self._shadows.get(slot), int(batch.epoch[slot]), int(batch.known[slot])
            if shadow is not None and shadow.epoch == epoch:
                came = batch.tokens[slot, shadow.at : min(known, shadow.at + len(shadow.tokens))]
                differs = np.flatnonzero(came != shadow.tokens[: len(came)])
                if not len(differs) and len(came) < len(shadow.tokens):
                    continue
                accepted = int(differs[0]) if len(differs) else len(came)
                learned.append((slot, epoch, shadow.matched, len(shadow.tokens), accepted))
            self._shadows.pop(slot, None)
            if count := min(SHADOW, int(proposal.counts[i])):
                self._shadows[slot] = Shadow(epoch, known, int(proposal.matched[i]), proposal.tokens[i, :count].copy())
        if learned:
            self.acceptance.learn(*np.array(learned).T)
