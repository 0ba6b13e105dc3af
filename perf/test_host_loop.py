"""What the host does without the device: Python of a step, how it grows, and how blocks are handed out.

Times are against others of the same run; shares and counts are those of any machine.
"""

from __future__ import annotations

import statistics
import time

import pytest

from pagegraph.runtime.scheduler.scheduler import Scheduler
from perf import host
from perf.gates import Gate, gates

FEW, MANY = 256, 2048  # sequences
SMALL_POOL, LARGE_POOL = 1 << 10, 1 << 18  # blocks


def test_python_of_a_step(benchmark, gate: Gate) -> None:
    found = benchmark.pedantic(lambda: host.decoding(FEW), rounds=1, iterations=1)
    loop = host.loop_seconds()
    benchmark.extra_info.update(outside_launch_us=found.outside_launch * 1e6, loop_us=loop * 1e6)
    gate.check(found.outside_launch / loop)


def test_python_of_a_step_sees_a_sleep(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a millisecond in a step fails the gate above."""
    schedule = Scheduler.schedule
    monkeypatch.setattr(Scheduler, "schedule", lambda *given: (time.sleep(1e-4), schedule(*given))[1])
    found = benchmark.pedantic(lambda: host.decoding(FEW), rounds=1, iterations=1)
    with pytest.raises(AssertionError, match="test_python_of_a_step"):
        gates()["test_python_of_a_step"].check(found.outside_launch / host.loop_seconds())


def test_growth_of_a_turn_with_its_sequences(benchmark, gate: Gate) -> None:
    few, many = ([host.decoding(seqs, 100).outside_launch for _ in range(3)] for seqs in (FEW, MANY))
    benchmark.pedantic(lambda: host.decoding(FEW, 20), rounds=1, iterations=1)
    ratio = statistics.median(many) / statistics.median(few) / (MANY / FEW)
    benchmark.extra_info.update(ratio=ratio, few_s=few, many_s=many)
    gate.check(ratio)


def test_blocks_of_a_large_pool(benchmark, gate: Gate) -> None:
    ratios = [host.pool_seconds(LARGE_POOL) / host.pool_seconds(SMALL_POOL) for _ in range(5)]
    benchmark.pedantic(lambda: host.pool_seconds(SMALL_POOL, 100), rounds=1, iterations=1)
    benchmark.extra_info.update(ratios=ratios)
    gate.check(statistics.median(ratios))


def test_unused_memory_of_blocks(benchmark, gate: Gate) -> None:
    found = benchmark.pedantic(host.mixed, rounds=1, iterations=1)
    share = statistics.mean(found.unused)
    benchmark.extra_info.update(share=share, most=max(found.unused))
    gate.check(share)
