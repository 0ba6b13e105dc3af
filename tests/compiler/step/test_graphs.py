"""Which graph a step replays while not all are captured; the capture itself needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.graphs import GraphSet, MaskedSampling

SMALL, MIDDLE, LARGE = Bucket(2, 2), Bucket(8, 8), Bucket(64, 16)


def test_a_larger_graph_serves_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs = GraphSet()
    assert graphs.holding(SMALL) is None
    graphs._graphs = {LARGE: None, MIDDLE: None, replace(SMALL, num_steps=3): None}
    assert (
        graphs.holding(SMALL) == MIDDLE
        and graphs.holding(Bucket(9, 3)) == LARGE
        and graphs.holding(Bucket(9, 17)) is None
    )


def test_closing_destroys_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else holds the graph's object: NCCL counts captured calls, and ends a group when none is left."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs, masked, reset = GraphSet(), MaskedSampling(), []

    def graph(name: str) -> Any:
        return SimpleNamespace(reset=lambda: reset.append(name))

    graphs._graphs = {SMALL: (graph("small"), None), LARGE: (graph("large"), None)}  # type: ignore[dict-item]
    masked._graphs = {MIDDLE: ((0, 0), graph("masked"), None)}  # type: ignore[dict-item]
    graphs.close()
    masked.close()
    assert reset == ["small", "large", "masked"] and SMALL not in graphs and graphs.replay(LARGE) is None
