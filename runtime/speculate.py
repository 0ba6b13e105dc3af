"""When to guess, and how much: between the engine's loop, the scheduler and those who guess.

Guesses need every token of their rows on the host, so a step with guesses is committed before the next one is planned;
all other steps are planned ahead as ever. Knows no device and no text.
"""

from __future__ import annotations

import numpy as np

from runtime.drafters import Retrieval
from runtime.scheduler import Arrived, Plan, Scheduler
from runtime.verify import Guesses


class Speculation:
    """Guesses `fixed` tokens a row for every step, or as many as pay."""

    def __init__(self, scheduler: Scheduler, retrieval: Retrieval, fixed: int) -> None:
        self.scheduler = scheduler
        self.retrieval = retrieval
        self.fixed = fixed

    def wants_results(self, running: Plan) -> bool:
        """Whether the results of the step in flight are wanted before the next is planned."""
        return True

    def guesses(self) -> Guesses | None:
        """For the next step; nothing is in flight."""
        rows, limits, budget = self.scheduler.room_for_guesses(self.fixed)
        if not len(rows) or not budget:
            return None
        proposal = self.retrieval.propose(self.scheduler.rows, rows, limits)
        counts = within(proposal.counts, budget)
        guessing = counts > 0
        if not guessing.any():
            return None
        return Guesses(rows[guessing], counts[guessing], proposal.tokens[guessing])

    def learn(self, arrived: Arrived) -> None:
        """Take what became of a step."""
        for sequence in arrived.ended:
            self.retrieval.ended(sequence.tokens)


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
