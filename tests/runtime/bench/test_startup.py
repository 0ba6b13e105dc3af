"""Figures of starts by name, and a start that fails."""

from __future__ import annotations

import pytest

from pagegraph.runtime.bench import startup
from pagegraph.runtime.bench.startup import Start


def test_the_names_of_startup() -> None:
    cold = [
        Start(1.0, 10.0, 0.5, {"weights": 2.0, "compile": 7.0}),
        Start(3.0, 20.0, 0.5, {"weights": 2.0, "compile": 9.0}),
    ]
    found = startup.figures(cold, [Start(1.0, 4.0, 0.1, {"weights": 2.0})])
    assert (found["avg_cold_startup_time"], found["cold_startup_times"]) == (15.0, [10.0, 20.0])
    assert found["avg_cold_compilation_time"] == 8.0 and found["warm_compilation_times"] == [0.0]
    assert found["cold_startup_percentiles"]["50"] == 15.0 and found["avg_warm_startup_time"] == 4.0
    assert found["avg_cold_import_time"] == 2.0 and found["avg_warm_first_token_time"] == 0.1
    assert found["warm_phases"] == [{"weights": 2.0}]


def test_caches_are_new_for_cold_starts_and_kept_for_warm_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def start(path: str, overrides: dict[str, str]) -> Start:
        seen.append((overrides["compile_cache_dir"], overrides["device"]))
        return Start(0.0, float(len(seen)), 0.0, {})

    monkeypatch.setattr(startup, "_start", start)
    ticks: list[int] = []
    cold, warm = startup.measure("m", {"device": "cpu"}, cold=2, warmups=1, warm=2, tick=lambda: ticks.append(1))
    folders = [folder for folder, _ in seen]
    assert len(set(folders[:2])) == 2 and set(folders[2:]) == {folders[1]} and len(ticks) == 5
    assert [one.total_startup_time for one in cold + warm] == [1.0, 2.0, 4.0, 5.0]


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="nowhere.yaml"):
        startup.measure("/nowhere.yaml", {}, cold=1, warmups=0, warm=1)
