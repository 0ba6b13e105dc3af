"""Times of arrival: the offered rate exactly, gaps of the distribution that burstiness names, the same by seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pagegraph.runtime.bench.arrivals import Ramp, arrival_times


def test_all_at_once() -> None:
    assert arrival_times(5, math.inf).tolist() == [0.0] * 5
    assert arrival_times(0, 3.0).tolist() == []


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    """Mean 1 / rate, and a deviation of mean / sqrt(burstiness), as a gamma distribution of that shape has it."""
    times = arrival_times(20_000, 50.0, burstiness=burstiness, seed=3)
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(20_000 / 50.0)  # the rate is the same for every seed
    assert gaps.min() >= 0 and gaps.std() * 50.0 == pytest.approx(burstiness**-0.5, rel=0.05)
    if burstiness == 1.0:  # exponential: the share of gaps above the mean
        assert (gaps > 1 / 50.0).mean() == pytest.approx(math.exp(-1), abs=0.02)


def test_infinite_burstiness_is_a_metronome() -> None:
    assert arrival_times(4, 2.0, burstiness=math.inf).tolist() == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_seed_gives_the_same_times() -> None:
    first, again, other = (arrival_times(50, 9.0, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("strategy, middle", [("linear", 50.5), ("exponential", 10.0)])
def test_a_ramp(strategy: str, middle: float) -> None:
    ramp = Ramp(strategy, 1.0, 100.0)
    assert ramp.rates(3).tolist() == pytest.approx([1.0, middle, 100.0])
    times = arrival_times(3, math.inf, burstiness=math.inf, ramp=ramp)
    assert np.diff(times, prepend=0.0).tolist() == pytest.approx([1.0, 1 / middle, 0.01])


@pytest.mark.parametrize(
    "wrong", [dict(rate=0.0), dict(rate=-1.0), dict(rate=math.nan), dict(rate=1.0, burstiness=0.0)]
)
def test_rates_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        arrival_times(3, **wrong)


@pytest.mark.parametrize("wrong", [("fast", 1.0, 2.0), ("linear", 0.0, 2.0), ("linear", 1.0, math.inf)])
def test_ramps_that_are_none(wrong: tuple[str, float, float]) -> None:
    with pytest.raises(ValueError, match="ramp"):
        Ramp(*wrong)
