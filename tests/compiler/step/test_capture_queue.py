"""Which graph is captured next, and when at once; draft graphs only while there is room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pagegraph.compiler.start_cache import StartCache
from pagegraph.compiler.step.capture_queue import (
    CAPTURE_IDLE,
    CAPTURE_NOW,
    MAX_DRAFT_FORWARDS,
    CaptureQueue,
    StoredOrder,
)
from pagegraph.compiler.step.capture_sizes import Bucket

SMALL, MIDDLE, LARGE = Bucket(2, 2), Bucket(8, 8), Bucket(64, 16)


def test_the_most_wanted_comes_first_then_the_smallest() -> None:
    queue = CaptureQueue([LARGE, SMALL, MIDDLE])
    assert queue.next() == SMALL
    assert not queue.want(LARGE)
    assert queue.next() == LARGE
    queue.done(LARGE)
    assert LARGE not in queue and queue.next() == SMALL
    queue.done(SMALL)
    queue.done(MIDDLE)
    assert queue.next() is None


def test_the_order_of_a_start_serves_the_next(tmp_path: Path) -> None:
    orders: list[list[Bucket]] = []
    queue = CaptureQueue([SMALL, MIDDLE, LARGE], captured=orders.append)
    queue.want(LARGE)
    queue.want(replace(SMALL, num_steps=2))
    while (bucket := queue.next()) is not None:
        assert not orders
        queue.done(bucket)
    assert orders == [[LARGE, SMALL, MIDDLE]]
    kept = StoredOrder(StartCache(tmp_path, "key"), "captures")
    assert kept.read() == []
    kept.write(orders[0])
    assert kept.read() == orders[0]
    larger = Bucket(128, 16)
    queue = CaptureQueue([SMALL, MIDDLE, LARGE, larger], [*orders[0], Bucket(3, 3)])
    assert queue.next() == LARGE
    queue.want(larger)
    assert queue.next() == larger


def test_what_is_wanted_often_is_due() -> None:
    queue = CaptureQueue([SMALL, LARGE])
    assert [queue.want(SMALL) for _ in range(CAPTURE_NOW)] == [False] * (CAPTURE_NOW - 1) + [True]
    assert not queue.want(LARGE)


def test_draft_graphs_are_captured_when_wanted_often_while_there_is_room() -> None:
    queue, draft, longer = (
        CaptureQueue(),
        replace(SMALL, num_steps=MAX_DRAFT_FORWARDS - 10),
        replace(SMALL, num_steps=11),
    )
    for _ in range(CAPTURE_IDLE - 1):
        assert not queue.want(draft) and not queue.want(longer)
    assert queue.next() is None
    queue.want(draft)
    assert queue.next() == draft
    queue.done(draft)
    assert longer not in queue and not any(queue.want(longer) for _ in range(2 * CAPTURE_NOW))
    assert [queue.want(replace(SMALL, num_steps=10)) for _ in range(CAPTURE_NOW)] == [False] * (CAPTURE_NOW - 1) + [
        True
    ]
