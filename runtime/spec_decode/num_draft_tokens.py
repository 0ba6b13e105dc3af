"""How many draft tokens pay: from the time of steps by their tokens, and from how often draft tokens are accepted.

Learned from the steps themselves. Knows no clock, no slots' contents and no device: numbers are handed in.

What a step of n tokens takes is speed (learned fast) times shape (learned slowly), because a busy moment is no reason
to think a size dear. While nothing is drafted, the host compares proposals with what comes in at most 1 % of the
time; a model is tried in at most 0.5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OUTLIER = np.log(3.0)  # a step that took longer than three times its prediction (a compilation, a pause) counts as this
SPEED_RATE = 0.1  # weight of a step in the common speed of all sizes
SHAPE_RATE = 0.05  # weight of a step in its own size's cost relative to the others, once it is known
# a class of draft tokens begins at each: longer matches are accepted more often
MATCHES = np.array([1, 2, 3, 4, 6, 9, 17, 33])
# Chances of a class before anything is known, the first of draft tokens that rest on no match.
PRIOR = np.array([0.6, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
PRIOR_WEIGHT = 4.0  # draft tokens' worth of the prior, and of all slots in the chance of one slot
SLOT_DECAY, ALL_DECAY = 0.95, 0.999  # weight of the past at each draft token


class StepCosts:
    """Milliseconds of a step by its tokens: ms(n, now) = speed(now) * shape(n), both learned.

    The speed follows context lengths and the machine's load quickly, the shape slowly: a busy moment slows all sizes,
    and does not make the size that it fell on look dear. Sizes are rounded up to `step_sizes`, those in which steps
    run.
    """

    def __init__(self, step_sizes: Sequence[int], measured: Mapping[int, float] | None = None) -> None:
        self.step_sizes = np.array(step_sizes)
        self._shape = np.zeros(len(step_sizes))  # logarithms
        self._seen = np.zeros(len(step_sizes), np.int64)
        self._speed = 0.0
        for num_tokens, ms in (measured or {}).items():
            self.observe(num_tokens, ms)

    def observe(self, num_tokens: int, ms: float) -> None:
        """A step of so many queries of one token took `ms`."""
        at = self._at(num_tokens)
        value = np.log(max(ms, 1e-3))
        if not self._seen.any():
            self._speed = value
        surprise = (
            float(np.clip(value - np.log(self.ms(self.step_sizes[at])), -OUTLIER, OUTLIER)) if self._seen.any() else 0.0
        )
        if self._seen[at]:
            self._speed += SPEED_RATE * surprise
            self._shape[at] += max(SHAPE_RATE, 0.5 / self._seen[at]) * surprise
        else:
            self._shape[at] = np.log(self.ms(self.step_sizes[at])) - self._speed + surprise if self._seen.any() else 0.0
        self._seen[at] += 1

    def ms(self, num_tokens: np.ndarray | int) -> np.ndarray:
        """Expected milliseconds of steps of so many tokens; NaN while nothing is known.

        Between known sizes a line; beyond the largest it grows with the root, so that larger ones are tried.
        """
        known = np.flatnonzero(self._seen)
        step_sizes = self.step_sizes[self._at(num_tokens)]
        if not len(known):
            return np.full(np.shape(step_sizes), np.nan)
        sizes, ms = self.step_sizes[known], np.exp(self._speed + self._shape[known])
        return np.interp(step_sizes, sizes, ms) * np.sqrt(np.maximum(step_sizes / sizes[-1], 1.0))

    def _at(self, num_tokens: np.ndarray | int) -> np.ndarray:
        return np.minimum(np.searchsorted(self.step_sizes, num_tokens), len(self.step_sizes) - 1)


class Acceptance:
    """How often a draft token is accepted if those before it were, by the slot and by the class of the match that it
    rests on.
    """

    def __init__(self, num_slots: int) -> None:
        self._epoch = np.zeros(num_slots, np.int64)
        self._slot_tried, self._slot_accepted = (np.zeros((num_slots, len(PRIOR))) for _ in range(2))
        self._tried = np.full(len(PRIOR), PRIOR_WEIGHT)
        self._accepted = PRIOR_WEIGHT * PRIOR

    def chances(self, slots: np.ndarray, epochs: np.ndarray, matched: np.ndarray, most: int) -> np.ndarray:
        """float64 [R, most]: that the draft tokens 0..j of each slot are all accepted, resting on matches of `matched`
        [R] tokens.
        """
        self._enter(slots, epochs)
        classes = _classes(matched, most)
        slot = slots[:, None]
        common = self._accepted[classes] / self._tried[classes]
        own = (self._slot_accepted[slot, classes] + PRIOR_WEIGHT * common) / (
            self._slot_tried[slot, classes] + PRIOR_WEIGHT
        )
        return np.cumprod(own, axis=1)

    def learn(
        self, slots: np.ndarray, epochs: np.ndarray, matched: np.ndarray, counts: np.ndarray, accepted: np.ndarray
    ) -> None:
        """Of counts[i] draft tokens in slot slots[i], no slot twice, the first accepted[i] were accepted; all int [R]."""
        if not len(slots):
            return
        self._enter(slots, epochs)
        at = np.arange(int(counts.max()))
        # What follows a wrong draft token was not put to the test.
        slot, place = np.nonzero(at < np.minimum(accepted + 1, counts)[:, None])
        index = slot * len(PRIOR) + _classes(matched, len(at))[slot, place]
        shape = len(slots), len(PRIOR)
        tries = np.bincount(index, minlength=shape[0] * shape[1]).reshape(shape)
        hits = np.bincount(index[place < accepted[slot]], minlength=shape[0] * shape[1]).reshape(shape)
        decay = SLOT_DECAY**tries
        self._slot_tried[slots] = self._slot_tried[slots] * decay + tries
        self._slot_accepted[slots] = self._slot_accepted[slots] * decay + hits
        decay = ALL_DECAY ** tries.sum(axis=0)
        self._tried = np.maximum(self._tried * decay, 1e-9) + tries.sum(axis=0)
        self._accepted = self._accepted * decay + hits.sum(axis=0)

    def _enter(self, slots: np.ndarray, epochs: np.ndarray) -> None:
        new = slots[self._epoch[slots] != epochs]
        self._epoch[slots] = epochs
        self._slot_tried[new] = self._slot_accepted[new] = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """Draft tokens a slot, int32 [R], and the tokens a millisecond that they are expected to give."""

    counts: np.ndarray
    rate: float


def choose(
    chances: np.ndarray, limits: np.ndarray, base: int, budget: int, costs: StepCosts, overhead_ms: float, margin: float
) -> Choice:
    """How many draft tokens a slot give the most tokens a millisecond; none where no number is better by `margin`.

    chances [R, K] fall along a row, so taking draft tokens in falling order takes the best of each number; limits [R]
    are draft tokens at hand, `budget` what the step has room for. A step without draft tokens has `base` tokens and
    brings as many tokens; one with draft tokens costs `overhead_ms` on top of its own time.
    """
    most = chances.shape[1]
    gains = np.where(np.arange(most) < limits[:, None], chances, 0.0).ravel()
    order = np.argsort(-gains, kind="stable")[: min(budget, int(np.minimum(limits, most).sum()))]
    none = np.zeros(len(limits), np.int32)
    num_tokens = base + np.arange(len(order) + 1)
    ms = costs.ms(num_tokens)
    ms[1:] += overhead_ms
    rates = (base + np.concatenate([[0.0], np.cumsum(gains[order])])) / ms
    best = int(np.nanargmax(rates)) if np.isfinite(rates).any() else 0
    if not best or rates[best] <= rates[0] * (1 + margin):
        return Choice(none, float(rates[0]))
    return Choice(np.bincount(order[:best] // most, minlength=len(limits)).astype(np.int32), float(rates[best]))


def _classes(matched: np.ndarray, most: int) -> np.ndarray:
    """[R, most]: of each draft token; each one that is accepted lengthens the match. Draft tokens that rest on none are
    a class of their own.
    """
    lengths = matched[:, None] + np.arange(most) * (matched > 0)[:, None]
    return np.searchsorted(MATCHES, lengths, side="right")
