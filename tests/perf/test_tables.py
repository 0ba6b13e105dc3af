"""The tables of the documents are those of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import tables
from tests.paths import ROOT

STORED = [ROOT / "perf" / "results" / f"h200-2026-11-24-{name}.json" for name in ("llama3-8b", "qwen3-0.6b")]


@pytest.fixture(scope="module")
def results() -> tables.Results:
    return tables.Results(STORED)


def test_known_rows(results: tables.Results) -> None:
    assert "| Qwen3-0.6B, one stream | 1,074 | 3.23 | 650 | 1.65 |" in list(tables.jobs(results))
    assert "| Llama-3-8B, 64 prompts of 4096 | 38,980 in + out | 1.16 | 40,584 in + out | 0.96 |" in list(
        tables.jobs(results)
    )
    assert "| Llama-3-8B | 256 x 384 | 10.89 | 1.25 |" in list(tables.steps(results))


def test_the_file_named_last_counts_and_scaled_jobs_do_not(tmp_path: Path) -> None:
    def file(name: str, requests: int, rate: float) -> Path:
        row = {"case": "batch32", "caching": False, "requests": requests, "out_tok_s": rate, "ratio": 1.0}
        path = tmp_path / name
        path.write_text(json.dumps({"sections": [{"section": "engine", "model": "8b", "rows": [row]}]}))
        return path

    found = tables.Results([file("a", 32, 10.0), file("b", 32, 20.0), file("c", 8, 30.0)])
    assert "| Llama-3-8B, 32 x (512 in, 256 out) | 20 | 1.00 |  |  |" in list(tables.jobs(found))


def test_quantised_models_have_rows_of_their_own(tmp_path: Path) -> None:
    job = {"case": "latency", "caching": False, "requests": 1, "out_tok_s": 300.0, "ratio": 1.4, "quantization": "fp8"}
    theirs = {**job, "model": "8b", "ours_over_theirs": 1.2}
    step = {"seqs": 1, "keys": 256, "replay_ms": 2.5, "ratio": 1.2, "quantization": "fp8"}
    sections = [
        dict(section="engine", model="8b", rows=[job]),
        dict(section="peer", model=None, rows=[theirs]),
        dict(section="step", model="8b", rows=[step]),
    ]
    path = tmp_path / "fp8.json"
    path.write_text(json.dumps({"sections": sections}))
    found = tables.Results([*STORED, path])
    assert {
        "| Llama-3-8B, one stream | 223 | 1.27 | 201 | 1.11 |",
        "| Llama-3-8B fp8, one stream | 300 | 1.40 | 300 | 1.20 |",
    } < set(tables.jobs(found))
    assert "| Llama-3-8B fp8 | 1 x 256 | 2.500 | 1.20 |" in list(tables.steps(found))
    assert list(tables.overview(found)) == list(tables.overview(tables.Results(STORED)))


def test_a_ratio_is_of_one_run_only() -> None:
    found = tables.Results([*STORED, STORED[0].with_name("h200-2026-11-24-llama3-8b-few-rows.json")])
    rows = list(tables.jobs(found))
    assert "| Llama-3-8B, one stream | 239 | 1.17 |  |  |" in rows
    assert "| Llama-3-8B, 64 prompts of 4096 | 38,980 in + out | 1.16 | 40,584 in + out | 0.96 |" in rows


def test_other_peers_get_columns_of_their_own() -> None:
    found = tables.Results(STORED)
    theirs = {"out_tok_s": 100.0, "total_tok_s": 150.0, "ours_over_theirs": 2.5}
    found.peers["transformers", "8b", "latency", False] = theirs
    assert "| Llama-3-8B, one stream | 223 | 1.27 | 201 | 1.11 | 100 | 2.50 |" in list(tables.jobs(found))


def test_a_served_run_is_one_row(tmp_path: Path) -> None:
    served = dict(
        way="served", out_tok_s=900.0, ttft_p50_ms=1.0, ttft_p99_ms=2.0, itl_p50_ms=3.0, itl_p99_ms=4.0, in_graphs=0.98
    )
    section = {
        "section": "serve",
        "model": "8b",
        "facts": {"served_over_offline": 0.9},
        "rows": [served, dict(way="offline", out_tok_s=1000.0)],
    }
    path = tmp_path / "served.json"
    path.write_text(json.dumps({"sections": [section]}))
    assert (
        list(tables.served(tables.Results([path])))[-1]
        == "| Llama-3-8B | 900 | 1,000 | 0.90 | 1, 2 | 3.0, 4.0 | 98.0% |"
    )
