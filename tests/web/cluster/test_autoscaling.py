"""How many replicas there are to be, without Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pagegraph.runtime.doctor.rules import Metrics
from pagegraph.runtime.engine.metrics import Counts, EngineMetrics
from pagegraph.web.cluster.autoscaling import RUNNING, WAITING, by_queue


def wanted(running: list[float], waiting: list[float], total: float = 0.0, target: float = 8.0) -> int:
    told = {
        name: dict(enumerate(values)) for name, values in ((RUNNING, running), (WAITING, waiting)) if values
    }  # fmt: skip
    context = SimpleNamespace(
        aggregated_metrics=told,
        total_num_requests=total,
        current_num_replicas=len(running) or 1,
        config=SimpleNamespace(target_ongoing_requests=target),
    )
    return by_queue(context)[0]


@pytest.mark.parametrize(
    ("running", "waiting", "replicas"),
    [
        ([0, 0, 0], [0, 0, 0], 0),  # Ray keeps to min_replicas
        ([8, 8], [0, 0], 2),
        ([8, 1], [0, 0], 2),
        ([4, 2], [0, 0], 1),
        ([10, 10], [20, 0], 5),
        ([2, 2], [2, 0], 3),  # the KV cache is full at two: room for two more is one more replica
        ([2, 2], [0.4, 0.4], 1),  # a mean over a window in which somebody waited for a moment
        ([0], [5], 2),  # prompts that are about to begin
    ],
)
def test_as_many_as_hold_what_runs_and_waits(running: list[float], waiting: list[float], replicas: int) -> None:
    assert wanted(running, waiting) == replicas


def test_before_replicas_tell_anything_rays_count_stands_for_theirs() -> None:
    assert wanted([], [], total=17.0) == 3


def test_a_server_has_metrics_of_these_names() -> None:
    metrics = EngineMetrics("m", 128)
    metrics.counts = lambda: Counts(num_running=3, num_waiting=2)
    found = Metrics(metrics.render().decode())
    assert (found(RUNNING), found(WAITING)) == (3, 2)
