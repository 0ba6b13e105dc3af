"""When requests arrive: all at once, as a Poisson process, burstier or more even than one, or at a rate that rises.

Knows numbers only. The same seed gives the same times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ramp:
    """A rate that goes from `start` to `end` requests a second over the requests, in equal steps or equal ratios."""

    strategy: str  # linear or exponential
    start: float
    end: float

    def __post_init__(self) -> None:
        if self.strategy not in ("linear", "exponential"):
            raise ValueError(f"the strategy of a ramp is linear or exponential, not {self.strategy}")
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ValueError("a ramp goes between rates above 0, such as from 1 to 10 requests a second")

    def rates(self, count: int) -> np.ndarray:
        """The rate at each of `count` requests."""
        progress = np.arange(count) / max(count - 1, 1)
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


def arrival_times(
    count: int, rate: float, *, burstiness: float = 1.0, seed: int = 0, ramp: Ramp | None = None
) -> np.ndarray:
    """Seconds from the start at which each of `count` requests arrives, in order.

    Gaps are gamma distributed with the shape `burstiness`: 1 is a Poisson process, less comes in bursts, infinity is a
    metronome. Without a ramp the times are stretched so that the last request comes at exactly count / rate, which
    keeps the offered rate the same for every seed.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"rate and burstiness are above 0, not {rate} and {burstiness}")
    if ramp is None and math.isinf(rate):
        return np.zeros(count)
    mean_gaps = 1.0 / (np.full(count, rate) if ramp is None else ramp.rates(count))
    if math.isinf(burstiness):
        gaps = mean_gaps
    else:
        gaps = np.random.default_rng([seed, 1]).gamma(burstiness, mean_gaps / burstiness)
    times = np.cumsum(gaps)
    if ramp is None and count:
        times *= count / rate / times[-1]
    return times
