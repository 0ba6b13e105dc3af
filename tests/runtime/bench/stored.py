"""Made-up runs, as the benches store them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagegraph.runtime.bench import measures
from pagegraph.runtime.bench.offline import Done, latency_figures, throughput_figures
from pagegraph.runtime.bench.outcome import Outcome
from pagegraph.runtime.bench.startup import Start, figures

THROUGHPUT = throughput_figures(Done(2.0, 30, 10, 5), 4)
LATENCY = latency_figures([0.5, 0.1, 0.4, 0.2, 0.3])
STARTUP = figures([Start(1.0, 9.0, 0.1, {"compile": 8.0})], [Start(1.0, 3.0, 0.1, {"compile": 2.0})])


def serve_figures(rate: float, label: str | None = None, count: int = 30, detailed: bool = True) -> dict[str, Any]:
    """A run of `bench serve` at a rate; the higher it is, the slower are answers."""
    rng = np.random.default_rng(round(rate))
    outcomes = []
    for number in range(count):
        gaps = (0.01 * (1 + rate) * (1 + 0.2 * rng.random(7))).tolist()
        ttft = 0.05 * (1 + rate) * (1 + rng.random())
        outcomes.append(
            Outcome(100 + number / rate, ttft, gaps, ttft + sum(gaps), 0.001 * number, 16, 8, has_usage=True)
        )
    found: dict[str, Any] = dict(backend="openai", label=label, request_rate=rate, max_concurrency=None)
    found |= measures.figures(outcomes, count / rate + 1, slos={"ttft": 200.0})
    return found | (measures.detail(outcomes) if detailed else {})
