"""Seconds that work takes on a CUDA device, by events on its stream: the host's calls are no part of it while it is ahead.

Knows no model and no step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

GROUPS = 5  # that the median is of


def group_seconds(act: Callable[[], object], count: int) -> float:
    """Seconds a call, of `count` calls of `act` enqueued back to back on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        act()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def median_seconds(act: Callable[[], object], budget_s: float = 0.03, count: int | None = None) -> float:
    """Median over GROUPS groups of seconds a call of `act`, after a few calls that warm up.

    count: calls a group, instead of what fits in `budget_s`.
    """
    group_seconds(act, 2)
    once = group_seconds(act, 2)
    calls = count or max(1, min(1000, int(budget_s / GROUPS / once)))
    return statistics.median(group_seconds(act, calls) for _ in range(GROUPS))
