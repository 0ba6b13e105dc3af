"""Step times predicted from step times."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.step_time import StepLoad, StepTime

DEPTHS = (0.0, 5000.0, 20_000.0)


def true_ms(load: StepLoad) -> float:
    return 4.0 + 0.02 * load.decodes + load.prompt_tokens * (0.02 + 1e-6 * load.depth)


def observed(loads: list[StepLoad], noise: float = 0.0) -> StepTime:
    step_time, chance = StepTime(), random.Random(0)
    for load in loads:
        step_time.observe(load, true_ms(load) * (1 + chance.uniform(-noise, noise)))
    return step_time


def all_kinds(times: int = 20) -> list[StepLoad]:
    """Decodes alone, and beside prompts of several depths."""
    chance = random.Random(1)
    decodes = [chance.randint(1, 200) for _ in range(times)]
    return [load for n in decodes for depth in DEPTHS for load in (StepLoad(n), StepLoad(n, 100 + 2 * n, depth))]


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepTime().decode_ms(4) is None and StepTime().prompt_tokens_in(10.0, 0) == 0


def test_prompts_alone_tell_nothing_of_decodes() -> None:
    assert observed([StepLoad(0, 500)] * 5).decode_ms(4) is None


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_finds_both_lines(depth: float, noise: float) -> None:
    step_time = observed(all_kinds(), noise)
    assert step_time.decode_ms(100) == pytest.approx(6.0, rel=0.05)
    assert step_time.step_ms(StepLoad(100, 300, depth)) == pytest.approx(true_ms(StepLoad(100, 300, depth)), rel=0.1)


@pytest.mark.parametrize("depth", DEPTHS)
def test_prompt_tokens_fill_the_time(depth: float) -> None:
    tokens = observed(all_kinds()).prompt_tokens_in(6.0, int(depth))
    assert tokens * (0.02 + 1e-6 * (depth + tokens / 2)) == pytest.approx(6.0, rel=0.1)


def test_one_size_says_nothing_of_others_but_its_own_time() -> None:
    step_time = observed([StepLoad(5)] * 9)
    assert [step_time.decode_ms(5), step_time.decode_ms(200)] == pytest.approx([4.1, 4.1])


def test_forgets_an_old_pace() -> None:
    step_time = StepTime()
    for pace in (5.0, 1.0):
        for load in all_kinds(100):
            step_time.observe(load, pace * true_ms(load))
    assert step_time.step_ms(StepLoad(50, 300)) == pytest.approx(true_ms(StepLoad(50, 300)), rel=0.1)


def test_no_time_leaves_no_room() -> None:
    step_time = observed(all_kinds())
    assert step_time.prompt_tokens_in(0.0, 0) == step_time.prompt_tokens_in(-3.0, 0) == 0


def test_prompts_that_cost_nothing_do_not_promise_a_free_huge_one() -> None:
    step_time = StepTime()
    for prompt_tokens in (0, 30) * 20:
        step_time.observe(StepLoad(8, prompt_tokens), 10.0)
    assert step_time.prompt_tokens_in(10.0, 0) == 60


def test_one_pause_does_not_spoil_the_lines() -> None:
    step_time = observed(all_kinds(100))
    for load in (StepLoad(50), StepLoad(50, 300)):
        step_time.observe(load, 20_000.0)
        assert step_time.step_ms(load) == pytest.approx(true_ms(load), rel=0.2)


def test_the_load_of_a_plan() -> None:
    def plan(starts: list[int], counts: list[int]) -> Plan:
        column = np.arange(len(starts), dtype=np.int32)
        return Plan(column, column, np.array(starts, np.int32), np.array(counts, np.int32), column > 0, [])

    assert StepLoad.of(plan([7, 9], [1, 1])) == StepLoad(2)
    assert StepLoad.of(plan([7, 0, 1000], [1, 300, 100])) == StepLoad(1, 400, (300 * 150 + 100 * 1050) / 400)


@pytest.mark.parametrize(
    "load", [StepLoad(450), StepLoad(10, 1100), StepLoad(10, 300, 2.1 * DEPTHS[-1])], ids=["decodes", "tokens", "depth"]
)
def test_nothing_is_expected_of_a_step_unlike_recent_ones(load: StepLoad) -> None:
    assert observed(all_kinds()).expected_ms(load) is None
    assert StepTime().expected_ms(load) is None


def test_a_step_like_recent_ones_is_expected_to_last_as_long() -> None:
    load = StepLoad(150, 400, 10_000.0)
    assert observed(all_kinds()).expected_ms(load) == pytest.approx(true_ms(load), rel=0.1)
