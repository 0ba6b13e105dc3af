"""What perf/ says of blocks without a clock, and that it says so of a fault that is planted."""

from __future__ import annotations

import functools
import statistics
import sys
from types import FrameType
from typing import Any

import pytest

from pagegraph.runtime.config import Config
from pagegraph.runtime.scheduler import block_pool
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.block_tables import BlockTables
from perf import host
from perf.gates import gates

GATE = "test_unused_memory_of_blocks"


def unused() -> float:
    return statistics.mean(host.mixed(requests=96, seqs=32).unused)


def test_few_slots_of_held_blocks_are_unused() -> None:
    gates()[GATE].check(unused())


@pytest.mark.parametrize("fault", ["large blocks", "blocks ahead of need"])
def test_unused_memory_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "large blocks":
        monkeypatch.setattr(host, "Config", functools.partial(Config, block_size=64))
    else:
        extend = BlockTables.extend
        ahead = lambda tables, slots, lengths, spare=0: extend(tables, slots, lengths + 32, spare)  # noqa: E731
        monkeypatch.setattr(BlockTables, "extend", ahead)
    with pytest.raises(AssertionError, match=GATE):
        gates()[GATE].check(unused())


def test_no_block_is_held_once_all_requests_have_ended() -> None:
    """With a pool that is too small for them, so that some are preempted, and one that is not."""
    roomy, tight = (host.mixed(requests=96, seqs=32, num_blocks=blocks) for blocks in (0, 520))
    assert roomy.held_blocks == tight.held_blocks == 0
    assert roomy.preemptions == 0 < tight.preemptions


def test_a_leak_of_blocks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    calls = [0]

    def leaking(pool: BlockPool, blocks: Any) -> None:
        calls[0] += 1
        release(pool, blocks[1:] if calls[0] % 10 == 0 else blocks)

    monkeypatch.setattr(BlockPool, "release", leaking)
    assert host.mixed(requests=96, seqs=32).held_blocks > 0


def lines_run(num_blocks: int) -> int:
    """Lines of block_pool.py that taking, registering, finding and returning blocks runs."""
    pool, lines = BlockPool(num_blocks, 16), 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != block_pool.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for number in range(20):
            taken = pool.take(8)
            pool.register(taken[0], number.to_bytes(16, "little"))
            pool.share(pool.lookup([number.to_bytes(16, "little")]))
            pool.release(taken[:1])
            pool.release(taken)
    finally:
        sys.settrace(before)
    return lines


def test_work_of_the_pool_does_not_grow_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_run(1 << 8) == lines_run(1 << 14) > 0
    take = BlockPool.take

    def walking(pool: BlockPool, count: int) -> list[int]:
        pool._walk()
        return take(pool, count)

    monkeypatch.setattr(BlockPool, "take", walking)
    assert lines_run(1 << 14) > 10 * lines_run(1 << 8)
