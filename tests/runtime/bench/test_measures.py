"""Figures against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.runtime.bench.measures import busiest_second, detail, figures, meets, most_at_once
from pagegraph.runtime.bench.outcome import Outcome


def outcome(start: float, ttft: float, gaps: list[float], tokens: int | None = None, **fields) -> Outcome:
    tokens = 1 + len(gaps) if tokens is None else tokens
    return Outcome(start, ttft, gaps, ttft + sum(gaps), prompt_len=10, output_tokens=tokens, **fields)


@pytest.fixture
def outcomes() -> list[Outcome]:
    rng = np.random.default_rng(0)
    return [
        outcome(rng.uniform(0, 5), rng.uniform(0.01, 0.3), rng.uniform(0.001, 0.05, rng.integers(0, 40)).tolist())
        for _ in range(200)
    ]


def test_percentiles_are_those_of_numpy(outcomes: list[Outcome]) -> None:
    found = figures(outcomes, 10.0, percentiles=[50, 90, 99, 99.9])
    values = {
        "ttft": [one.ttft for one in outcomes],
        "tpot": [sum(one.itl) / len(one.itl) for one in outcomes if one.itl],
        "itl": np.concatenate([one.itl for one in outcomes]),
        "e2el": [one.latency for one in outcomes],
    }
    for metric, seconds in values.items():
        times = 1e3 * np.array(seconds)
        assert found[f"mean_{metric}_ms"] == pytest.approx(times.mean())
        assert found[f"median_{metric}_ms"] == found[f"p50_{metric}_ms"] == pytest.approx(np.median(times))
        assert found[f"std_{metric}_ms"] == pytest.approx(times.std())
        for at in (90, 99, 99.9):
            assert found[f"p{at}_{metric}_ms"] == pytest.approx(np.percentile(times, at))


def test_rates_by_hand() -> None:
    found = figures([outcome(0, 0.1, [0.1, 0.1]), outcome(1, 0.2, [0.3]), Outcome(error="HTTP 500")], 4.0)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 5)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (
        0.5,
        1.25,
        6.25,
    )
    assert found["request_goodput"] is None and found["max_concurrent_requests"] == 1


def test_tpot_counts_tokens_where_an_event_holds_several() -> None:
    one = outcome(0, 0.1, [0.4, 0.5], tokens=10)
    assert one.tpot == pytest.approx(0.1)
    found = figures([one], 1.0)
    assert found["mean_tpot_ms"] == pytest.approx(100) and found["mean_itl_ms"] == pytest.approx(450)


def test_goodput_counts_requests_that_keep_every_objective() -> None:
    fast, late, slow = outcome(0, 0.1, [0.02]), outcome(0, 0.3, [0.02]), outcome(0, 0.1, [0.05])
    found = figures([fast, late, slow, Outcome(error="lost")], 2.0, slos={"ttft": 200, "tpot": 30})
    assert found["request_goodput"] == 0.5
    assert meets(late, {"tpot": 30}) and not meets(late, {"e2el": 300})
    assert meets(outcome(0, 0.1, []), {"tpot": 1, "itl": 1})  # one token has no TPOT to miss, and no gap


def test_an_objective_of_itl_is_about_the_slow_gaps_of_a_request() -> None:
    held_up_once, often = outcome(0, 0.1, [0.02] * 199 + [0.5]), outcome(0, 0.1, [0.02] * 95 + [0.5] * 5)
    assert meets(held_up_once, {"itl": 30}) and not meets(often, {"itl": 30}) and meets(often, {"tpot": 50})


def test_nothing_to_measure_is_none_and_no_zero() -> None:
    found = figures([Outcome(error="lost")], 1.0)
    assert found["completed"] == 0 and found["mean_ttft_ms"] is None and found["p99_e2el_ms"] is None
    found = figures([outcome(0, 0.1, [])], 1.0)
    assert found["mean_ttft_ms"] == pytest.approx(100) and found["mean_tpot_ms"] is None and found["p90_itl_ms"] is None


def test_chosen_metrics_alone() -> None:
    found = figures([outcome(0, 0.1, [0.1])], 1.0, metrics=["ttft"], percentiles=[95])
    assert [name for name in found if name.endswith("_ms")] == ["mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p95_ttft_ms"]  # fmt: skip


def test_the_busiest_second() -> None:
    steady = outcome(10.0, 0.5, [0.4] * 4)  # 10.5 and 10.9, then 11.3, 11.7, 12.1
    assert busiest_second([steady]) == 2
    assert busiest_second([steady, outcome(11.2, 0.1, [0.1], tokens=8)]) == 2 + 8
    assert busiest_second([]) == 0


def test_most_at_once() -> None:
    ended, next_one, long_one = outcome(0, 1, []), outcome(1, 1, []), outcome(0.5, 3, [])
    assert most_at_once([ended, next_one]) == 1
    assert most_at_once([ended, next_one, long_one]) == 2 and most_at_once([]) == 0


def test_detail_is_one_value_a_request() -> None:
    found = detail([outcome(0, 0.1, [0.2], text="a"), Outcome(error="lost")])
    assert found["ttfts"] == [0.1, 0.0] and found["errors"] == ["", "lost"] and found["itls"] == [[0.2], []]
