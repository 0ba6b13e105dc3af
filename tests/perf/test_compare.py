"""The comparison with transformers: its table, and that every way of the peer does the work that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import compare, peers
from perf.floors import write_model


def run(**given: float) -> dict:
    return {**dict(req_s=2.0, out_tok_s=10.0, ttft_ms=50.0, memory_mib=100.0), **given}


def test_the_table_says_how_much_better_the_engine_is() -> None:
    rows = [
        compare.row("engine", [run(req_s=1.0), run(), run(req_s=9.0)]),
        compare.row("one by one", [run(req_s=0.5, out_tok_s=4.0, ttft_ms=500.0, memory_mib=80.0)]),
    ]
    assert compare.lines(rows)[2:] == [
        "| this engine | 2.00 | 10.0 | 50 | 100 |",
        "| transformers, one by one | 0.50 (4.00 x) | 4.0 (2.50 x) | 500 (10.00 x) | 80 (0.80 x) |",
    ]


@pytest.mark.parametrize("way", ["one by one", "static batches", "continuous batching"])
def test_every_way_answers_all_prompts(tmp_path: Path, way: str) -> None:
    if way == "continuous batching":
        pytest.importorskip("psutil", reason="transformers asks it for the memory of a CPU")
    model = peers.load(write_model("tiny", tmp_path), "cpu", "float32", dummy=True)
    ways = {
        "one by one": peers.static_batches(1),
        "static batches": peers.static_batches(2),
        "continuous batching": peers.continuous,
    }
    done = ways[way](model, [[5, 6, 7], [8] * 9, [9, 9]], [4, 2, 5])
    assert len(done.first_token_s) == 3 and 0 < min(done.first_token_s) and max(done.first_token_s) <= done.seconds
    if way != "continuous batching":
        assert done.first_token_s == sorted(done.first_token_s)
