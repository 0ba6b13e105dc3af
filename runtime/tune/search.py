"""The search: a baseline and its spread, then key after key from the best configuration so far.

A candidate is kept if two runs of it beat the best by more than runs of the baseline differ. Knows no engine: whoever
measures, the clock and the keys are handed in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pagegraph.runtime.config import Config, ConfigError, check
from pagegraph.runtime.tune.measurement import CannotRun, Measurement, Objective, OutOfTime, TooSlow

LEAST_SPREAD = 0.02  # of a value: what lies closer is taken for equal however quiet the baseline was
LEAST_TAIL_SPREAD = 0.05
GIVE_UP = 2.0  # times the best run's duration, after which a candidate cannot win


class Bench(Protocol):
    """Whoever measures."""

    def measure(self, config: Config, limit_s: float | None) -> Measurement:
        """Raises CannotRun, TooSlow behind `limit_s` seconds of a run, OutOfTime."""
        ...

    def has_model(self, config: Config) -> bool:
        """Whether a run of it needs no other model than the one that is built."""
        ...


@dataclass(frozen=True, slots=True)
class Tries:
    """Values of a key. A direction is followed until a value is no better than the best."""

    directions: Sequence[Sequence[Any]] = ()
    left_out: Sequence[str] = ()  # why there are no others


@dataclass(frozen=True, slots=True)
class Knob:
    """A key to try: what is worth trying, seen from the best configuration and its run."""

    key: str
    tries: Callable[[Config, Measurement], Tries]
    fits: Callable[[Config], str] = lambda config: ""  # why a candidate does not fit; empty if it does


@dataclass(frozen=True, slots=True)
class Spread:
    """How far runs of the baseline lie apart, as shares: of the value and of the tail."""

    values: list[float]
    value: float
    tail: float

    @classmethod
    def of(cls, values: list[float], tails: list[float]) -> Spread:
        return cls(values, max(_apart(values), LEAST_SPREAD), max(_apart(tails), LEAST_TAIL_SPREAD))


@dataclass(frozen=True, slots=True)
class Tried:
    """One candidate. outcome: kept, no better, noise (better once, not twice), given up, or cannot run."""

    key: str
    value: Any
    outcome: str
    run: Measurement | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A key that was changed, and the runs that justify it: the best until then, and the worse of two with it."""

    before: Any
    after: Any
    best: Measurement
    run: Measurement


@dataclass(slots=True)
class Found:
    """All that the search has to say."""

    baseline: Measurement  # the run in the middle
    spread: Spread
    config: Config
    best: Measurement
    changes: dict[str, Change] = field(default_factory=dict)
    tried: list[Tried] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # key, reason
    not_reached: list[str] = field(default_factory=list)  # keys for which the budget was too short


class Search:
    """`say` is told each result in a line."""

    def __init__(
        self,
        bench: Bench,
        objective: Objective,
        knobs: Sequence[Knob],
        *,
        repeats: int = 3,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._bench = bench
        self._objective = objective
        self._knobs = knobs
        self._repeats = repeats
        self._say = say

    def run(self, config: Config) -> Found:
        """Raises OutOfTime or CannotRun if the baseline could not be measured."""
        runs = []
        for number in range(self._repeats):
            runs.append(self._bench.measure(config, None))
            self._say(f"baseline {number + 1} of {self._repeats}: {self._told(runs[-1])}")
        values, tails = [self._objective.value(one) for one in runs], [self._objective.tail(one) for one in runs]
        middle = sorted(runs, key=self._objective.value)[len(runs) // 2]
        found = Found(middle, Spread.of(values, tails), config, middle)
        self._say(f"runs of the baseline differ by {found.spread.value:.1%}: what is closer than that is no better")
        for place, knob in enumerate(self._knobs):
            try:
                self._turn(knob, found)
            except OutOfTime:
                found.not_reached = [one.key for one in self._knobs[place:]]
                break
        return found

    def _turn(self, knob: Knob, found: Found) -> None:
        """Try one key."""
        tries = knob.tries(found.config, found.best)
        for reason in tries.left_out:
            found.left_out.append((knob.key, reason))
            self._say(f"{knob.key}: left out: {reason}")
        for direction in tries.directions:
            for value in direction:
                one = self._try(knob, value, found)
                found.tried.append(one)
                shown = f": {self._told(one.run)}" if one.run else ""
                self._say(f"{knob.key}={value}: {one.outcome}{f' ({one.reason})' if one.reason else ''}{shown}")
                if one.outcome != "kept":
                    break

    def _try(self, knob: Knob, value: Any, found: Found) -> Tried:
        config = dataclasses.replace(found.config, **{knob.key: value})
        try:
            check(config)
        except ConfigError as error:
            return Tried(knob.key, value, "cannot run", reason=str(error))
        if reason := knob.fits(config):
            return Tried(knob.key, value, "cannot run", reason=reason)
        limit_s = GIVE_UP * found.best.figures["duration"]
        best = found.best
        try:
            run = self._bench.measure(config, limit_s)
            if not self._beats(run, best, found):
                return Tried(knob.key, value, "no better", run)
            if self._bench.has_model(found.config):  # the machine may be another than it was
                best = self._bench.measure(found.config, None)
            again = self._bench.measure(config, limit_s)
        except TooSlow:
            return Tried(knob.key, value, "given up", reason=f"took over {GIVE_UP:g} times as long as the best")
        except CannotRun as error:
            return Tried(knob.key, value, "cannot run", reason=str(error))
        worse = min(run, again, key=lambda one: (self._objective.value(one), -self._objective.tail(one)))
        if not all(self._beats(one, best, found) for one in (run, again)):
            return Tried(knob.key, value, "noise", worse, "better once, not twice")
        first = found.changes.get(knob.key)
        found.changes[knob.key] = Change(
            first.before if first else getattr(found.config, knob.key), value, first.best if first else best, worse
        )
        found.config, found.best = config, worse
        return Tried(knob.key, value, "kept", worse)

    def _beats(self, one: Measurement, best: Measurement, found: Found) -> bool:
        """More, by more than the spread; or as much, with a tail that is shorter by more than its spread."""
        value, most = self._objective.value(one), self._objective.value(best)
        margin = max(found.spread.value * most, self._objective.grain(best))
        if value > most + margin:
            return True
        # Ties may not add up to less: they are held against the baseline, too.
        floor = max(most, self._objective.value(found.baseline)) - margin
        return value >= floor and self._objective.tail(one) < (1 - found.spread.tail) * self._objective.tail(best)

    def _told(self, one: Measurement) -> str:
        figures = one.figures
        value = f"{self._objective.name} {self._objective.value(one):.4g}"
        times = [(name, figures[f"p99_{name}_ms"]) for name in ("ttft", "itl")]
        return ", ".join([value, *(f"{name.upper()} p99 {ms:.0f} ms" for name, ms in times if ms is not None)])


def _apart(values: Sequence[float]) -> float:
    """Largest less smallest, as a share of the mean."""
    mean = float(np.mean(values))
    return (max(values) - min(values)) / mean if mean else 0.0
