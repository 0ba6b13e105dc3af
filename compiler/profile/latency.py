"""Milliseconds of a decode step by its size, measured in the dummy slot: the first values of the step-time model.

Contexts are one token long, so these are lower bounds. Knows no requests.
"""

from __future__ import annotations

import statistics
import time

from pagegraph.compiler.step.dummy import dummy_step
from pagegraph.compiler.step.step import CompiledStep

REPEATS = 3


def measure_latency(step: CompiledStep, most: int) -> dict[int, float]:
    """Tokens -> milliseconds of a step, for a few sizes up to `most`; nothing may be in flight."""
    found = {}
    for size in _few(step.decode_sizes(most)):
        one = dummy_step([1] * size, step.state.dummy_slot)
        seconds = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            step.launch(one).wait()
            seconds.append(time.perf_counter() - start)
        found[size] = 1e3 * statistics.median(seconds[1:])
    return found


def _few(sizes: tuple[int, ...]) -> list[int]:
    """The first, then each at least half as large again as the one before, and the last."""
    kept = [sizes[0]]
    for size in sizes[1:]:
        if size >= 1.5 * kept[-1] or size == sizes[-1]:
            kept.append(size)
    return kept
