"""The rule for prompts beside decodes, on a simulated clock: streams keep their pace, prompts get on, jobs lose nothing."""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.runtime.scheduler.chunk_limit import DRAIN_STEPS, PATIENCE, STRETCH, Backlog, ChunkCounts, ChunkLimit
from pagegraph.runtime.scheduler.step_time import StepLoad, StepTime
from tests.runtime.scheduler.simulation import Job, Outcome, learnt, simulate

STREAMS = [Job(0, 100, 1000)] * 8


def limit_of(target_ms: float | None = None) -> ChunkLimit:
    """Of steps of 10 ms, with or without prompt tokens of 0.05 ms each."""
    step_time = StepTime()
    for _ in range(50):
        step_time.observe(StepLoad(8), 10.0)
        step_time.observe(StepLoad(8, 1000), 60.0)
    return ChunkLimit(step_time, target_ms, least=16)


def asked(limit: ChunkLimit, *backlog: int) -> int:
    return limit.prompt_tokens(8192, 8, 0, Backlog(*backlog))


def test_until_decodes_have_been_timed_there_is_no_limit() -> None:
    limit = ChunkLimit(StepTime(), least=16)
    assert asked(limit) == 8192 and limit.counts == ChunkCounts()


def test_a_step_may_last_a_multiple_of_its_decodes() -> None:
    limit = limit_of()
    assert asked(limit) == pytest.approx((STRETCH - 1) * 10.0 / 0.05, abs=1)
    assert limit.counts.target_ms == pytest.approx(STRETCH * 10.0) and limit.counts.steps["target"] == 1


def test_a_backlog_is_computed_within_so_many_steps() -> None:
    limit = limit_of()
    assert asked(limit, 1, 1000 * DRAIN_STEPS) == 1000
    assert asked(limit, 16, 100 * DRAIN_STEPS) == 100 * DRAIN_STEPS * 16 // (PATIENCE * 8), "two prompts to a stream"
    assert asked(limit, 1000, 9000) == 8192
    assert limit.counts.steps == {"target": 0, "backlog": 2, "budget": 1}


def test_a_target_in_milliseconds_is_kept_whatever_waits() -> None:
    limit = limit_of(20.0)
    assert asked(limit, 1000, 10**6) == pytest.approx(200, abs=1)
    assert limit.counts.target_ms == 20.0


def test_a_target_below_the_decodes_leaves_the_least() -> None:
    assert asked(limit_of(5.0)) == 16


def streams_beside(prompts: list[Job], limit: ChunkLimit | None) -> Outcome:
    return simulate(sorted([*STREAMS, *prompts], key=lambda job: job.at), limit)


@pytest.mark.parametrize("prompt", [500, 6000, 100_000])
def test_streams_keep_their_pace_beside_a_prompt(prompt: int) -> None:
    free = streams_beside([Job(500, prompt, 4)], None)
    held = streams_beside([Job(500, prompt, 4)], learnt())
    own = np.median(simulate(STREAMS, None).all_gaps())
    gap = held.all_gaps(range(8)).max()
    assert gap < 1.1 * STRETCH * own or (prompt == 100_000 and gap < 40.0), (
        "deep in a prompt the least chunk takes longer"
    )
    assert prompt == 500 or free.all_gaps(range(8)).max() > 10 * own
    assert held.first[8] < 1.15 * STRETCH / (STRETCH - 1) * free.first[8] + 3 * own, (
        "prompts have the rest of the device"
    )


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    shorts = [Job(1000 + 400 * i, 200, 20) for i in range(20)]
    held = streams_beside([Job(600, 100_000, 4), *shorts], learnt())
    assert max(held.first[9:]) < 200.0 < held.first[8] / 10
    assert held.all_gaps(range(8)).max() < 40.0


def test_a_long_prompt_does_not_starve_behind_short_ones() -> None:
    """More short prompts than there is time for, all the while: the long one keeps half of what prompts get."""
    shorts = [Job(600 + 4 * i, 200, 2) for i in range(600)]
    alone = streams_beside([Job(500, 6000, 4)], learnt())
    held = streams_beside([Job(500, 6000, 4), *shorts], learnt())
    assert held.first[8] < 3 * alone.first[8]


OFFLINE = {
    "600 of (128, 256)": [Job(0, 128, 256)] * 600,
    "mixed lengths": [Job(0, 50 + 37 * i % 2950, 20 + 53 * i % 480) for i in range(300)],
    "64 of (4096, 32)": [Job(0, 4096, 32)] * 64,
    "32 of (512, 256)": [Job(0, 512, 256)] * 32,
}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_job_that_comes_at_once_loses_little(name: str) -> None:
    """Of a long one 1 %, of a burst some steps."""
    free, held = simulate(OFFLINE[name], None), simulate(OFFLINE[name], learnt())
    assert held.wall < max(1.01 * free.wall, free.wall + 230.0)
    assert sum(load.prompt_tokens for load in held.steps) >= 0.99 * sum(job.prompt for job in OFFLINE[name])


def test_where_prompts_come_too_fast_throughput_is_kept() -> None:
    """Twice what the device computes, for a while: the queue is done nearly as soon as without a limit."""
    jobs = [Job(8 * i, 600, 30) for i in range(500)]
    limit = learnt()
    free, held = simulate(jobs, None), simulate(jobs, limit)
    assert held.wall < 1.04 * free.wall and limit.counts.steps["backlog"] > 20
