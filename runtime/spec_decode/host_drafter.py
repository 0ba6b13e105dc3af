"""When to draft, and how much, where the host proposes: between the engine's loop, the scheduler and those who propose.

Such draft tokens need every token of their slots on the host, so the step before is committed before they are made; all other steps
are planned ahead as ever. Where the number of draft tokens is left to the engine, what is looked up is compared with what comes
while nothing is drafted: knowing whether draft tokens would be accepted takes no step. Knows no device.

Splitting the batch into two alternating halves, so that only those wait who have draft tokens, would read the weights
twice; so all wait, and the wait is part of what draft tokens must earn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pagegraph.compiler.step.inputs import NgramOutput
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.spec_decode.num_draft_tokens import Acceptance, StepCosts, choose
from pagegraph.runtime.spec_decode.proposer import Proposal, Proposer, empty_proposal

SHADOW = 3  # draft tokens a slot that are compared with what comes without being verified
SEARCH_SHARE = 0.01  # share of time that looking for draft tokens may take while nothing is drafted
PROBE_SHARE = 0.005  # share of time for draft tokens of a model that are not expected to pay: they may by now
MADE = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15)  # draft tokens a slot that the model may be asked for
# gain in tokens a millisecond from which drafting starts, and down to which it goes on
START_DRAFTING, KEEP_DRAFTING = 0.05, 0.0
RATE = 0.1  # weight of a step in the averages here


@dataclass(slots=True)
class Shadow:
    """Draft tokens that are not verified: for position `at` of the sequence of that epoch."""

    epoch: int
    at: int
    matched: int
    tokens: np.ndarray


class Drafter(Protocol):
    """What the engine asks before each step, and tells after it: `Speculation`, and `runtime.spec_decode.device_drafter.DeviceLookup`."""

    def wants_results(self, running: Plan) -> bool:
        """Whether the results of the step in flight are wanted before the next is planned."""
        ...

    def propose(self, ahead: bool) -> DraftTokens | None:
        """For the next step; `ahead`: one is in flight."""
        ...

    def learn(
        self, plan: Plan, result: StepResult, ngram: NgramOutput | None, step_ms: float, overhead_ms: float
    ) -> None:
        """Take what became of a step, what it took, and what passed between the results before it and its launch."""
        ...


class ModelProposer(Protocol):
    """Draft tokens by computing: `runtime.spec_decode.draft_model.DraftModel`."""

    def propose(self, at: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """counts[i] tokens for slot at[i]: int32 [R, K]."""
        ...


@dataclass(slots=True)
class Offer:
    """What could be drafted: the first limits[i] of proposal i, or as many by the model where it is not `retrieved`."""

    slots: np.ndarray
    limits: np.ndarray
    proposal: Proposal
    retrieved: np.ndarray  # bool [R]
    chances: np.ndarray  # float64 [R, K]


class HostDrafter:
    """Drafts `most` tokens a slot for every step; with `costs`, as many of them as pay.

    Where both n-gram proposer and model could draft token, the one does that has been right more often on such a match.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        proposer: Proposer | None,
        most: int,
        costs: StepCosts | None = None,
        model: ModelProposer | None = None,
        model_ms: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`model_ms`: what a step of the model takes, a first idea."""
        self.scheduler = scheduler
        self.proposer = proposer
        self.most = most
        self.costs = costs
        self.model = model
        self.clock = clock
        self.acceptance = Acceptance(scheduler.max_num_seqs)
        self._matched = np.zeros(scheduler.max_num_seqs, np.int32)  # of the draft tokens in flight
        self._shadows: dict[int, Shadow] = {}  # by slot
        self._overhead_ms = 0.5  # from a step's results to the launch of one with draft tokens, less the model's time
        self._model_ms = model_ms  # of a draft token
        self._spent_ms = 0.0  # by the model for the draft tokens in flight
        self._search_ms = 0.1
        self._search_budget_ms = 0.0  # allowed for looking
        self._probe_budget_ms = 0.0  # and for draft tokens of the model that are not expected to pay
        self._drafting = False  # whether the last step that could have had draft tokens had any
        self._probing = False

    def wants_results(self, running: Plan) -> bool:
        """See `Drafter`."""
        if running.drafts is not None or self.costs is None:
            return True
        return self._would_draft()

    def propose(self, ahead: bool) -> DraftTokens | None:
        """See `Drafter`; none while a step is in flight."""
        if ahead:
            return None
        counters = self.scheduler.counters
        drafting, self._drafting = self._drafting, False
        counters.mean_draft_tokens = self._spent_ms = 0.0
        probing, self._probing = self._probing, False
        slots, limits, budget = self.scheduler.room_for_drafts(self.most)
        if not len(slots) or not budget:
            return None
        offer = self._offer(slots, limits, 0)
        if probing:
            counts = within(np.minimum(np.where(offer.retrieved, 0, offer.limits), 1), budget)
        elif self.costs is not None:
            counts = self._paying(offer, budget, KEEP_DRAFTING if drafting else START_DRAFTING)
        else:
            counts = within(offer.limits, budget)
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
        if self.proposer is not None:
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
            overhead_ms = max(overhead_ms - self._spent_ms, 0.0)
            self._overhead_ms += RATE * (min(overhead_ms, 4 * self._overhead_ms) - self._overhead_ms)
        if self.costs is not None:
            if plan.num_tokens == len(plan):
                self.costs.observe(len(plan), step_ms)
            self._search_budget_ms = min(self._search_budget_ms + SEARCH_SHARE * step_ms, 2 * self._search_ms)
            if self.model is not None:
                self._probe_budget_ms += PROBE_SHARE * step_ms

    def _offer(self, slots: np.ndarray, limits: np.ndarray, ahead: int) -> Offer:
        """What could be drafted for the slots; an n-gram proposal's first `ahead` tokens are for those in flight, and left out."""
        epochs = self.scheduler.batch.epoch[slots]
        if self.proposer is None:
            proposal = empty_proposal(len(slots), int(limits.max()))
        else:
            proposal = self.proposer.propose(self.scheduler.batch, slots, limits)
        most = proposal.tokens.shape[1]
        ngram_chances = self.acceptance.chances(slots, epochs, proposal.matched, most)[:, ahead:]
        available = np.maximum(proposal.counts - ahead, 0)
        if self.model is None:
            return Offer(slots, available, proposal, np.ones(len(slots), bool), ngram_chances)
        computed = self.acceptance.chances(slots, epochs, np.zeros(len(slots), np.int32), most)[:, : most - ahead]
        retrieved = available > 0
        if most > ahead:
            retrieved &= ngram_chances[:, 0] >= computed[:, 0]
        chances = np.where(retrieved[:, None], ngram_chances, computed)
        return Offer(slots, np.where(retrieved, available, np.maximum(limits - ahead, 0)), proposal, retrieved, chances)

    def _paying(self, offer: Offer, budget: int, margin: float) -> np.ndarray:
        """How many of the draft tokens pay: the best over how many the model makes, which takes its time for each."""
        assert self.costs is not None
        base, best = self.scheduler.num_running, None
        for made in MADE if self.model is not None and not offer.retrieved.all() else (0,):
            if made > self.most:
                break
            limits = np.where(offer.retrieved, offer.limits, np.minimum(offer.limits, made))
            overhead = self._overhead_ms + made * self._model_ms
            choice = choose(offer.chances, limits, base, budget, self.costs, overhead, margin)
            if best is None or choice.rate > best.rate:
                best = choice
        assert best is not None  # without the model too
        return best.counts

    def _tokens(self, offer: Offer, counts: np.ndarray) -> np.ndarray:
        """int32 [R, K] of which counts [R] are wanted; runs the model where they are its own."""
        tokens = offer.proposal.tokens
        computed = np.flatnonzero(~offer.retrieved & (counts > 0))
        if len(computed):
            assert self.model is not None
            begin, made = self.clock(), int(counts[computed].max())
            tokens[computed, :made] = self.model.propose(offer.slots[computed], counts[computed])
            self._spent_ms = (self.clock() - begin) * 1e3
            self._model_ms += RATE * (min(self._spent_ms / made, 4 * self._model_ms) - self._model_ms)
            self._probe_budget_ms = max(min(self._probe_budget_ms, 0.0), self._probe_budget_ms - self._spent_ms)
        return tokens

    def _would_draft(self) -> bool:
        """Whether draft tokens would pay in the next step, seen from a token earlier; looks only as often as it may."""
        if self._search_budget_ms < self._search_ms:
            return False
        assert self.costs is not None
        begin = self.clock()
        slots, limits, budget = self.scheduler.room_for_drafts(self.most, lag=1)
        found = False
        if len(slots) and budget and could_pay(self.scheduler.num_running, budget, self.costs):
            offer = self._offer(slots, limits, 1)
            self._compare(slots, offer.proposal)
            found = bool(self._paying(offer, budget, START_DRAFTING).any())
            if not found and self.model is not None and not offer.retrieved.all():
                found = self._probing = self._may_probe(len(slots))
        spent = (self.clock() - begin) * 1e3
        self._search_ms += RATE * (min(spent, 4 * self._search_ms) - self._search_ms)
        self._search_budget_ms -= self._search_ms
        return found

    def _may_probe(self, num_slots: int) -> bool:
        """Whether enough was saved for a draft token of the model in each slot; it is spent then."""
        assert self.costs is not None
        base = self.scheduler.num_running
        price = self._model_ms + self._overhead_ms + float(self.costs.ms(base + num_slots) - self.costs.ms(base))
        if self._probe_budget_ms < price:
            return False
        self._probe_budget_ms -= price
        return True

    def _compare(self, slots: np.ndarray, proposal: Proposal) -> None:
        """Learn from shadows that have been overtaken, and cast new ones."""
        batch = self.scheduler.batch
        learned: list[tuple[int, int, int, int, int]] = []  # slot, epoch, matched, draft tokens, held
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


def could_pay(base: int, budget: int, costs: StepCosts) -> bool:
    """Whether draft tokens beside `base` slots would pay if all were accepted."""
    num_tokens = base + np.arange(budget + 1)
    rates = num_tokens / costs.ms(num_tokens)
    return bool(rates.max() > rates[0] * (1 + START_DRAFTING))


def within(counts: np.ndarray, budget: int) -> np.ndarray:
    """int32 [R] -> as many as `budget` allows in all, first the first draft token of each slot, then the second."""
    if counts.sum() <= budget:
        return counts
    level = np.minimum(counts[:, None], np.arange(1, counts.max() + 1)).sum(axis=0)
    fits = int(np.searchsorted(level, budget, side="right"))
    kept = np.minimum(counts, fits)
    more = np.flatnonzero(counts > kept)[: budget - int(kept.sum())]
    kept[more] += 1
    return kept
