"""A start with filled caches against one with empty ones, each in a process of its own, with a cache of its own."""

from __future__ import annotations

import pytest

from pagegraph.runtime.bench import startup
from perf.gates import Gate
from perf.test_cpu_engine import MODEL

SETTINGS = {"device": "cpu", "dtype": "bfloat16", "max_model_len": "2048", "kv_cache_memory": "64MiB"}

pytestmark = pytest.mark.timeout(1800)


def test_warm_start(benchmark, gate: Gate) -> None:
    cold, warm = benchmark.pedantic(lambda: startup.measure(MODEL, SETTINGS, cold=1, warmups=0, warm=2), rounds=1)
    found = startup.figures(cold, warm)
    benchmark.extra_info.update(found)
    gate.check(min(one.total_startup_time for one in warm) / cold[0].total_startup_time)
