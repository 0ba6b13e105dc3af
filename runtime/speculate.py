"""When to guess, and how much: between the engine's loop, the scheduler and those who guess.

Guesses need every token of their rows on the host, so a step with guesses is committed before the next one is planned;
all other steps are planned ahead as ever. Where the number of guesses is left to the engine, what is looked up is
compared with what comes while nothing is guessed: knowing whether guesses would hold takes no step. Knows no device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.auto_k import Acceptance, StepCosts, choose
from runtime.drafters import Proposal, Retrieval
from runtime.scheduler import Arrived, Plan, Scheduler
from runtime.verify import Guesses

SHADOW = 3  # guesses a row that are compared with what comes without being verified
LOOKING = 0.01  # share of time that looking for guesses may take while nothing is guessed
START, STAY = 0.05, 0.0  # gain in tokens a millisecond from which guessing starts, and down to which it goes on
RATE = 0.1  # weight of a step in the averages here


@dataclass(slots=True)
class Shadow:
    """Guesses that are not verified: for position `at` of the sequence of that stay."""

    stay: int
    at: int
    matched: int
    tokens: np.ndarray


class Speculation:
    """Guesses `fixed` tokens a row for every step; without, as many as pay by `costs`, up to `most`."""

    def __init__(
        self,
        scheduler: Scheduler,
        retrieval: Retrieval,
        most: int,
        costs: StepCosts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.retrieval = retrieval
        self.most = most
        self.costs = costs
        self.clock = clock
        self.acceptance = Acceptance(scheduler.max_num_seqs)
        self._matched = np.zeros(scheduler.max_num_seqs, np.int32)  # of the guesses in flight
        self._shadows: dict[int, Shadow] = {}  # by row
        self._overhead_ms = 0.5  # from a step's results to the launch of one with guesses
        self._look_ms = 0.1
        self._allowance_ms = 0.0  # for looking

    def wants_results(self, running: Plan) -> bool:
        """Whether the results of the step in flight are wanted before the next is planned."""
        if running.guessed is not None or self.costs is None:
            return True
        return self._would_guess()

    def guesses(self) -> Guesses | None:
        """For the next step; nothing is in flight."""
        rows, limits, budget = self.scheduler.room_for_guesses(self.most)
        counters = self.scheduler.counters
        guessing, counters.guesses_a_row = counters.guesses_a_row > 0, 0.0
        if not len(rows) or not budget:
            return None
        proposal = self.retrieval.propose(self.scheduler.rows, rows, limits)
        counts = within(proposal.counts, budget)
        if self.costs is not None and counts.any():
            counts = self._paying(rows, proposal, budget, 0, STAY if guessing else START)
        some = np.flatnonzero(counts)
        if not len(some):
            return None
        self._matched[rows[some]] = proposal.matched[some]
        counters.guesses_a_row = float(counts[some].mean())
        return Guesses(rows[some], counts[some], proposal.tokens[some])

    def learn(self, plan: Plan, arrived: Arrived, step_ms: float, overhead_ms: float) -> None:
        """Take what became of a step, what it took, and what passed between the results before it and its launch."""
        for sequence in arrived.ended:
            self.retrieval.ended(sequence.tokens[sequence.num_prompt :])
        if self.costs is None:
            return
        if plan.num_tokens == len(plan):
            self.costs.observe(len(plan), step_ms)
        self._allowance_ms = min(self._allowance_ms + LOOKING * step_ms, 2 * self._look_ms)
        if (verdict := arrived.verdict) is not None and len(verdict.rows):
            self._overhead_ms += RATE * (min(overhead_ms, 4 * self._overhead_ms) - self._overhead_ms)
            stays = self.scheduler.rows.stay[verdict.rows]
            self.acceptance.learn(verdict.rows, stays, self._matched[verdict.rows], verdict.counts, verdict.accepted)

    def _paying(self, rows: np.ndarray, proposal: Proposal, budget: int, ahead: int, margin: float) -> np.ndarray:
        """How many of the proposed guesses pay, beyond the first `ahead`, which are for tokens in flight."""
        stays = self.scheduler.rows.stay[rows]
        chances = self.acceptance.chances(rows, stays, proposal.matched, proposal.tokens.shape[1])[:, ahead:]
        return choose(
            chances, proposal.counts - ahead, self.scheduler.num_running, budget, self.costs, self._overhead_ms, margin
        )  # fmt: skip

    def _would_guess(self) -> bool:
        """Whether guesses would pay in the next step, seen from a token earlier; looks only as often as it may."""
        if self._allowance_ms < self._look_ms:
            return False
        begin = self.clock()
        rows, limits, budget = self.scheduler.room_for_guesses(self.most, lag=1)
        found = False
        if len(rows) and budget and self._could_pay(budget):
            proposal = self.retrieval.propose(self.scheduler.rows, rows, limits)
            self._compare(rows, proposal)
            found = bool(self._paying(rows, proposal, budget, 1, START).any())
        spent = (self.clock() - begin) * 1e3
        self._look_ms += RATE * (min(spent, 4 * self._look_ms) - self._look_ms)
        self._allowance_ms -= self._look_ms
        return found

    def _could_pay(self, budget: int) -> bool:
        """Whether guesses would pay if all held."""
        base = self.scheduler.num_running
        entries = base + np.arange(budget + 1)
        rates = entries / self.costs.ms(entries)
        return bool(rates.max() > rates[0] * (1 + START))

    def _compare(self, rows: np.ndarray, proposal: Proposal) -> None:
        """Learn from shadows that have been overtaken, and cast new ones."""
        r = self.scheduler.rows
        learned: list[tuple[int, int, int, int, int]] = []  # row, stay, matched, guesses, held
        for i, row in enumerate(rows.tolist()):
            shadow, stay, known = self._shadows.get(row), int(r.stay[row]), int(r.known[row])
            if shadow is not None and shadow.stay == stay:
                came = r.tokens[row, shadow.at : min(known, shadow.at + len(shadow.tokens))]
                differs = np.flatnonzero(came != shadow.tokens[: len(came)])
                if not len(differs) and len(came) < len(shadow.tokens):
                    continue
                held = int(differs[0]) if len(differs) else len(came)
                learned.append((row, stay, shadow.matched, len(shadow.tokens), held))
            self._shadows.pop(row, None)
            if count := min(SHADOW, int(proposal.counts[i])):
                self._shadows[row] = Shadow(stay, known, int(proposal.matched[i]), proposal.tokens[i, :count].copy())
        if learned:
            self.acceptance.learn(*np.array(learned).T)


def within(counts: np.ndarray, budget: int) -> np.ndarray:
    """int32 [R] -> as many as `budget` allows in all, first the first guess of each row, then the second."""
    if counts.sum() <= budget:
        return counts
    level = np.minimum(counts[:, None], np.arange(1, counts.max() + 1)).sum(axis=0)
    fits = int(np.searchsorted(level, budget, side="right"))
    kept = np.minimum(counts, fits)
    more = np.flatnonzero(counts > kept)[: budget - int(kept.sum())]
    kept[more] += 1
    return kept
