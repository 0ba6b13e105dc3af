"""What the engine asks of whoever decides on draft tokens, and the arithmetic that all of them share.

A drafter says before each step which slots get draft tokens and how many; a proposer says which tokens. Knows no
device.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pagegraph.compiler.step.inputs import NgramOutput
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.spec_decode.num_draft_tokens import StepCosts

# Gain in tokens a millisecond from which drafting starts, and down to which it goes on.
START_DRAFTING, KEEP_DRAFTING = 0.05, 0.0


class Drafter(Protocol):
    """What the engine asks before each step, and tells after it: a `HostDrafter`, `ModelDrafter` or `DeviceDrafter`."""

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
