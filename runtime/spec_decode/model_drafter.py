"""When a draft model is asked for draft tokens, and for how many, beside a proposer that searches text.

A slot takes the proposer's tokens where those have been right more often, on a match of that length, than the model's.
Draft tokens of the model cost its time: they have to pay for it, and are tried now and then where they are not expected
to. Knows no device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from pagegraph.compiler.step.inputs import NgramOutput
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.spec_decode.drafter import within
from pagegraph.runtime.spec_decode.host_drafter import RATE, HostDrafter, Offer
from pagegraph.runtime.spec_decode.num_draft_tokens import StepCosts, choose
from pagegraph.runtime.spec_decode.proposer import Proposer

PROBE_SHARE = 0.005  # share of time for draft tokens of the model that are not expected to pay: they may by now
MADE = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15)  # draft tokens a slot that the model may be asked for


class ModelProposer(Protocol):
    """Draft tokens by computing: `runtime.spec_decode.draft_model.DraftModel`."""

    def propose(self, at: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """counts[i] tokens for slot at[i]: int32 [R, K]."""
        ...


class ModelDrafter(HostDrafter):
    """A `HostDrafter` whose slots may take draft tokens of `model` instead of the proposer's."""

    def __init__(
        self,
        scheduler: Scheduler,
        proposer: Proposer,
        most: int,
        costs: StepCosts | None,
        model: ModelProposer,
        model_ms: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`model_ms`: what a step of the model takes, a first idea."""
        super().__init__(scheduler, proposer, most, costs, clock)
        self.model = model
        self._model_ms = model_ms  # of a draft token
        self._spent_ms = 0.0  # by the model, for the draft tokens in flight
        self._probe_budget_ms = 0.0  # saved for draft tokens that are not expected to pay
        self._probe_next = self._probing = False  # whether the next step tries them, and the one that is planned

    def propose(self, ahead: bool) -> DraftTokens | None:
        """See `Drafter`."""
        if not ahead:
            self._probing, self._probe_next, self._spent_ms = self._probe_next, False, 0.0
        return super().propose(ahead)

    def learn(
        self, plan: Plan, result: StepResult, ngram: NgramOutput | None, step_ms: float, overhead_ms: float
    ) -> None:
        """See `Drafter`; what the model took is no overhead."""
        super().learn(plan, result, ngram, step_ms, max(overhead_ms - self._spent_ms, 0.0))
        if self.costs is not None:
            self._probe_budget_ms += PROBE_SHARE * step_ms

    def _offer(self, slots: np.ndarray, limits: np.ndarray, ahead: int) -> Offer:
        offer = super()._offer(slots, limits, ahead)
        most = offer.proposal.tokens.shape[1]
        epochs = self.scheduler.batch.epoch[slots]
        chances = self.acceptance.chances(slots, epochs, np.zeros(len(slots), np.int32), most)[:, : most - ahead]
        retrieved = offer.limits > 0
        if most > ahead:
            retrieved &= offer.chances[:, 0] >= chances[:, 0]
        return Offer(
            slots,
            np.where(retrieved, offer.limits, np.maximum(limits - ahead, 0)),
            offer.proposal,
            retrieved,
            np.where(retrieved[:, None], offer.chances, chances),
        )

    def _counts(self, offer: Offer, budget: int, margin: float) -> np.ndarray:
        if self._probing:
            return within(np.minimum(np.where(offer.retrieved, 0, offer.limits), 1), budget)
        return super()._counts(offer, budget, margin)

    def _paying(self, offer: Offer, costs: StepCosts, budget: int, margin: float) -> np.ndarray:
        """The best over how many draft tokens the model makes, which takes its time for each."""
        if offer.retrieved.all():
            return super()._paying(offer, costs, budget, margin)
        choices = [
            choose(
                offer.chances,
                np.where(offer.retrieved, offer.limits, np.minimum(offer.limits, made)),
                self.scheduler.num_running,
                budget,
                costs,
                self._overhead_ms + made * self._model_ms,
                margin,
            )
            for made in MADE
            if made <= self.most
        ]
        return max(choices, key=lambda choice: choice.rate).counts

    def _tokens(self, offer: Offer, counts: np.ndarray) -> np.ndarray:
        tokens = offer.proposal.tokens
        computed = np.flatnonzero(~offer.retrieved & (counts > 0))
        if len(computed):
            begin, made = self.clock(), int(counts[computed].max())
            tokens[computed, :made] = self.model.propose(offer.slots[computed], counts[computed])
            self._spent_ms = (self.clock() - begin) * 1e3
            self._model_ms += RATE * (min(self._spent_ms / made, 4 * self._model_ms) - self._model_ms)
            self._probe_budget_ms = max(min(self._probe_budget_ms, 0.0), self._probe_budget_ms - self._spent_ms)
        return tokens

    def _worth_a_probe(self, offer: Offer, costs: StepCosts) -> bool:
        """Whether enough was saved for a draft token of the model in each slot; it is spent then."""
        if offer.retrieved.all():
            return False
        base = self.scheduler.num_running
        more = float(costs.ms(base + len(offer.slots)) - costs.ms(base))
        price = self._model_ms + self._overhead_ms + more
        if self._probe_budget_ms < price:
            return False
        self._probe_budget_ms -= price
        self._probe_next = True
        return True
