"""Step times predicted from step times."""

from __future__ import annotations

import random

import pytest

from pagegraph.runtime.scheduler.step_time import StepTime


def observed(sizes: list[int], fixed: float, per_token: float, target_ms: float = 30.0, noise: float = 0.0) -> StepTime:
    step_time, chance = StepTime(target_ms), random.Random(0)
    for tokens in sizes:
        step_time.observe(tokens, fixed + per_token * tokens + chance.uniform(-noise, noise))
    return step_time


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepTime(30.0).prefill_tokens_beside(4) is None and StepTime(30.0).step_ms(1) is None


def test_finds_the_line() -> None:
    step_time = observed([8, 100, 16, 300] * 10, fixed=10.0, per_token=0.05)
    assert step_time.step_ms(200) == pytest.approx(20.0)
    assert step_time.prefill_tokens_beside(8) == 400 - 8


def test_finds_the_line_through_noise() -> None:
    step_time = observed([8, 100, 16, 600] * 30, fixed=10.0, per_token=0.05, noise=1.0)
    assert step_time.prefill_tokens_beside(8) == pytest.approx(392, rel=0.1)


def test_forgets_an_old_pace() -> None:
    step_time = observed([8, 400] * 50, fixed=1.0, per_token=0.01)
    for tokens in [8, 400] * 200:
        step_time.observe(tokens, 10.0 + 0.05 * tokens)
    assert step_time.step_ms(200) == pytest.approx(20.0, rel=0.05)


def test_a_target_below_the_fixed_cost_leaves_no_room() -> None:
    assert observed([8, 100] * 20, fixed=40.0, per_token=0.05).prefill_tokens_beside(8) == 0


def test_flat_small_steps_do_not_promise_a_free_huge_one() -> None:
    assert observed([7, 8, 9] * 20, fixed=20.0, per_token=0.0).prefill_tokens_beside(8) <= 2 * 9 - 8


def test_room_grows_step_by_step_to_what_the_target_allows() -> None:
    step_time = observed([8] * 300, fixed=20.0, per_token=0.01)
    taken = []
    for _ in range(12):
        chunk = max(step_time.prefill_tokens_beside(8), 16)
        taken.append(chunk)
        step_time.observe(8 + chunk, 20.0 + 0.01 * (8 + chunk))
    assert taken[-1] == pytest.approx(992, abs=2)
    assert max(20.0 + 0.01 * (8 + chunk) for chunk in taken) < 30.5


def test_one_pause_does_not_spoil_the_line() -> None:
    step_time = observed([8, 100, 16, 300] * 20, fixed=10.0, per_token=0.05)
    step_time.observe(100, 20_000.0)
    assert step_time.step_ms(200) == pytest.approx(20.0, rel=0.1)
