"""Which graph a step replays while not all are captured; the capture itself needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pagegraph.compiler.step.capture_queue import CHAINED, DUE, OFTEN, Pending
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.graphs import GraphSet

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


def test_chains_are_captured_when_wanted_often_while_there_is_room() -> None:
    pending, chain, longer = Pending(), replace(SMALL, times=CHAINED - 10), replace(SMALL, times=11)
    for _ in range(OFTEN - 1):
        assert not pending.want(chain) and not pending.want(longer)
    assert pending.next() is None
    pending.want(chain)
    assert pending.next() == chain
    pending.done(chain)
    assert longer not in pending and not any(pending.want(longer) for _ in range(2 * DUE))
    assert [pending.want(replace(SMALL, times=10)) for _ in range(DUE)] == [False] * (DUE - 1) + [True]


def test_a_larger_graph_serves_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs = GraphSet()
    assert graphs.holding(SMALL) is None
    graphs._graphs = {LARGE: None, MIDDLE: None, replace(SMALL, times=3): None}
    assert (
        graphs.holding(SMALL) == MIDDLE
        and graphs.holding(Bucket(9, 3)) == LARGE
        and graphs.holding(Bucket(9, 17)) is None
    )
