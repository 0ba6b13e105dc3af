"""Finds which sequence a failed step is to blame on, by letting its sequences run one at a time.

An exception does not say which sequence raised it. So every sequence of the step is restarted and runs alone for a few
steps: one that fails alone is to blame, and the others go on. If none fails alone and a step of several fails again
soon, they run alone for twice as long: in the end each by itself, which is slow and still right. Knows no step, no
socket and no clock: the engine says what happened, and asks before each step who runs.

Only where a step of the engine's own fails as well is it the device, and the engine ends. `commit` changes nothing
before all that may raise is done, and reports before slots are freed; that is all the common path pays.
"""

from __future__ import annotations

from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence, State

ISOLATED_STEPS = 3  # that bring tokens: the prompt's last, a decode, and one that may verify draft tokens
PEACE = 100  # steps after which a failure has nothing to do with the one before


class FaultIsolation:
    """Sequences that have not run alone yet; the first of them is running alone."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._untried: list[Sequence] = []
        self._length = ISOLATED_STEPS
        self._left = 0  # steps that the first of them has yet to come through
        self._peace = PEACE  # steps that came through since one failed

    def __bool__(self) -> bool:
        return bool(self._untried)

    def accuse(self, touched: list[Sequence]) -> Sequence | None:
        """A step failed that had to do with these -> whoever is to blame, if it is known by now."""
        if self._untried:
            guilty = self._untried[0]
        else:
            self._length = ISOLATED_STEPS if self._peace >= PEACE else 2 * self._length
            # If all of a step's sequences ran well alone before, a waiting one is to blame, or their combination.
            again = self._length > ISOLATED_STEPS
            self._untried = self._scheduler.live if again or not touched else list(touched)
            guilty = self._untried[0] if len(self._untried) == 1 else None
        self._peace = 0 if guilty is None else PEACE
        self._left = 0 if guilty is not None else self._length
        return guilty

    def stepped(self, num_tokens: int) -> None:
        """A step came through and brought tokens to so many sequences."""
        if not self._untried:
            self._peace += 1
        elif num_tokens:
            self._left -= 1

    def choose(self) -> None:
        """Let the next of them run alone, or everybody. Nothing is in flight."""
        while self._untried and (self._left <= 0 or self._untried[0].state is State.FINISHED):
            cleared = self._untried.pop(0)
            self._left = self._length
            if cleared.state is State.RUNNING:
                self._scheduler.preempt(cleared)
        self._scheduler.alone = self._untried[0] if self._untried else None
