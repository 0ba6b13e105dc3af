"""How many draft tokens pay: costs and acceptance learned from made-up steps, and whole decisions in a simulated engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.runtime.spec_decode.num_draft_tokens import PRIOR, Acceptance, StepCosts, choose

STEP_SIZES = (1, 2, 4, 8, 16, 32, 64)


def costs_of(ms: dict[int, float]) -> StepCosts:
    costs = StepCosts(STEP_SIZES, ms)
    for size, value in list(ms.items()) * 200:
        costs.observe(size, value)
    return costs


def test_costs_are_those_observed_and_lines_between() -> None:
    costs = costs_of({1: 10.0, 4: 16.0, 16: 40.0})
    assert costs.ms(np.array([1, 4, 16])) == pytest.approx([10, 16, 40], rel=0.02)
    assert costs.ms(8) == pytest.approx(16 + 24 / 3, rel=0.02)
    assert costs.ms(3) == costs.ms(4), "a step of three runs as one of four"
    assert costs.ms(64) == pytest.approx(80, rel=0.02), "unknown sizes look cheap enough to be tried"
    assert np.isnan(StepCosts(STEP_SIZES).ms(1))


def test_a_busy_moment_slows_all_sizes_alike() -> None:
    costs = costs_of({1: 10.0, 8: 20.0})
    for _ in range(30):
        costs.observe(1, 30.0)
    one, eight = costs.ms(np.array([1, 8]))
    assert one == pytest.approx(30, rel=0.1)
    assert eight > 35, "what made one size slow most likely slows the other"
    costs.observe(1, 10_000.0)
    assert costs.ms(1) < 1.5 * one, "a single pause is no trend"


def test_a_size_that_becomes_dear_is_noticed() -> None:
    costs = costs_of({1: 10.0, 8: 12.0})
    for _ in range(60):
        costs.observe(1, 10.0)
        costs.observe(8, 40.0)
    assert costs.ms(8) / costs.ms(1) == pytest.approx(4, rel=0.15)


ints = lambda *values: np.array(values, np.int32)  # noqa: E731


def test_chances_start_at_the_prior_and_follow_what_happens() -> None:
    acceptance = Acceptance(2)
    chances = acceptance.chances(ints(0), ints(1), ints(1), 3)
    assert chances[0] == pytest.approx(np.cumprod(PRIOR[[1, 2, 3]])), "each accepted draft token lengthens the match"
    for _ in range(60):
        acceptance.learn(ints(0, 1), ints(1, 2), ints(3, 3), ints(4, 4), ints(4, 0))
    good, bad = acceptance.chances(ints(0, 1), ints(1, 2), ints(3, 3), 2)
    assert good[1] > 0.85 and bad[0] < 0.15
    new = acceptance.chances(ints(1), ints(3), ints(3), 1)
    assert 0.3 < new[0, 0] < 0.7, "a sequence that enters a slot starts with what all slots tell"
    untouched = acceptance.chances(ints(1), ints(3), ints(0), 1)
    assert untouched[0, 0] == PRIOR[0]


def test_what_follows_a_wrong_draft_token_was_not_put_to_the_test() -> None:
    acceptance = Acceptance(1)
    for _ in range(100):
        acceptance.learn(ints(0), ints(1), ints(0), ints(4), ints(1))  # one held, one did not
    assert acceptance.chances(ints(0), ints(1), ints(0), 1)[0, 0] == pytest.approx(0.5, abs=0.05)


@given(
    slots=st.integers(1, 4),
    budget=st.integers(0, 12),
    slope=st.floats(0.01, 2.0),
    overhead=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
def test_the_choice_is_the_best_of_all(slots: int, budget: int, slope: float, overhead: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chances = np.cumprod(rng.uniform(0, 1, (slots, 3)), axis=1)
    limits = rng.integers(0, 4, slots).astype(np.int32)
    costs = costs_of({n: 5 + slope * n for n in STEP_SIZES})
    found = choose(chances, limits, slots, budget, costs, overhead, 0.0)
    assert (found.counts <= limits).all() and found.counts.sum() <= budget

    def rate(counts: tuple[int, ...]) -> float:
        total = sum(counts)
        tokens = slots + sum(chances[slot, :count].sum() for slot, count in enumerate(counts))
        return tokens / float(costs.ms(slots + total) + (overhead if total else 0))

    allowed = [c for c in np.ndindex(*(limits + 1)) if sum(c) <= budget]
    assert found.rate == pytest.approx(max(map(rate, allowed)))
    assert rate(tuple(found.counts)) == pytest.approx(found.rate)


def test_nothing_is_drafted_for_less_than_the_margin() -> None:
    costs = costs_of({1: 10.0, 2: 10.0})
    chances = np.array([[0.04]])
    assert choose(chances, ints(1), 1, 1, costs, 0.0, 0.05).counts.tolist() == [0]
    assert choose(chances, ints(1), 1, 1, costs, 0.0, 0.0).counts.tolist() == [1]
    assert choose(chances, ints(1), 1, 1, costs, 1.0, 0.0).counts.tolist() == [0], (
        "the wait costs more than the draft token brings"
    )
