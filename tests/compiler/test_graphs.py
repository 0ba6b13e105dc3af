"""Which graph a step replays while not all are captured; the capture itself needs a GPU."""

from __future__ import annotations

import pytest
import torch

from compiler.buckets import Bucket
from compiler.graphs import DUE, GraphSet, Pending

SMALL, MIDDLE, LARGE = Bucket(2, 2), Bucket(8, 8), Bucket(64, 16)


def test_the_most_wanted_comes_first_then_the_smallest() -> None:
    pending = Pending([LARGE, SMALL, MIDDLE])
    assert pending.next() == SMALL
    assert not pending.want(LARGE)
    assert pending.next() == LARGE
    pending.done(LARGE)
    assert LARGE not in pending and pending.next() == SMALL
    pending.done(SMALL)
    pending.done(MIDDLE)
    assert pending.next() is None


def test_what_is_wanted_often_is_due() -> None:
    pending = Pending([SMALL, LARGE])
    assert [pending.want(SMALL) for _ in range(DUE)] == [False] * (DUE - 1) + [True]
    assert not pending.want(LARGE)


def test_a_larger_graph_serves_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs = GraphSet()
    assert graphs.holding(SMALL) is None
    graphs._graphs = {LARGE: None, MIDDLE: None}
    assert graphs.holding(SMALL) == MIDDLE and graphs.holding(Bucket(9, 3)) == LARGE and graphs.holding(Bucket(9, 17)) is None
