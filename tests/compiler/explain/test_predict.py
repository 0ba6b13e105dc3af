"""Predicted times of steps beside those that were replayed on an H200, and what they are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pagegraph.compiler import build
from pagegraph.compiler.explain.ledger import planned_states
from pagegraph.compiler.explain.machines import GPUS
from pagegraph.compiler.explain.predict import call_seconds, step_seconds
from pagegraph.compiler.explain.roofline import floor_of
from pagegraph.compiler.explain.trace import Call, decodes, trace
from pagegraph.compiler.options import CompilerOptions, KvCacheOptions, ModelOptions, StepOptions
from pagegraph.compiler.passes.registry import graph_passes
from pagegraph.kernels.costs import Cost, StepRows
from perf.floors import write_model
from tests.paths import ROOT

H200 = GPUS["h200"]
SEQS = 256  # most in a step of the stored runs, to which steps of prompts are padded
STEP_TOKENS = 8192
STEPS, MIXTURE = "h200-2026-11-29-steps-and-jobs.json", "h200-2026-11-30-qwen3-30b-a3b-24l-steps.json"


def measured(name: str, file: str) -> list[tuple[StepRows, int, float]]:
    """Rows of a step, its padded sequences, and milliseconds: of replayed decodes, and of a job of long prompts alone."""
    found = []
    for section in json.loads((ROOT / "perf" / "results" / file).read_text())["sections"]:
        for row in section["rows"] if section["model"] == name else ():
            if "replay_ms" in row and row["seqs"] > 1:  # one is padded to two
                found.append((decodes(row["seqs"], row["keys"]), row["seqs"], row["replay_ms"]))
            if row.get("case") == "prefill":
                two = np.array([4096, 4096])
                found.append((StepRows(two, two), SEQS, row["turn_ms"]))
    return found


@pytest.mark.parametrize(
    "name, file",
    [("0.6b", STEPS), pytest.param("8b", STEPS, marks=pytest.mark.slow), pytest.param("30b-a3b-24l", MIXTURE, marks=pytest.mark.slow)],
)  # fmt: skip
def test_stored_steps_of_an_h200_are_predicted(name: str, file: str, tmp_path: Path) -> None:
    options = CompilerOptions(
        model=ModelOptions(model=str(write_model(name, tmp_path)), load_format="dummy", max_model_len=STEP_TOKENS),
        device=torch.device("cuda"), capability=(9, 0), kv_cache=KvCacheOptions(block_size=16),
        step=StepOptions(max_num_seqs=SEQS, max_decode_tokens=SEQS, max_num_batched_tokens=STEP_TOKENS),
    )  # fmt: skip
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    traced = trace(model.paged_model, state, build.warm_steps(state), graph_passes(options.passes, options.device))
    steps = measured(name, file)
    assert len(steps) == 3
    for rows, seqs, ms in steps:
        totals, calls = traced.costs(rows, seqs)
        seconds = step_seconds(calls, 2 * seqs * model.vocab_size, H200)
        assert 1e3 * seconds == pytest.approx(ms, rel=0.2)
        assert seconds > floor_of(totals, H200)[0]


def product(rows: int, size: tuple[int, int] = (4096, 4096)) -> Call:
    flops, weights = 2 * rows * size[0] * size[1], 2 * size[0] * size[1]
    return Call("linear", 2 * rows * sum(size), Cost("linears", flops, weights), rows, size[1], 0, (size,))


def test_a_product_reads_its_weights_until_its_rows_take_longer() -> None:
    few, some, many, more = (call_seconds(product(rows), H200) for rows in (8, 64, 4096, 8192))
    weights = product(8).cost.weight_bytes / H200.bandwidth  # type: ignore[union-attr]
    assert weights < few < some < 1.3 * few
    assert many > 10 * some and more == pytest.approx(2 * many, rel=0.05)


def test_rows_of_few_cost_what_they_multiply() -> None:
    one, two = (call_seconds(product(rows), H200) for rows in (1, 2))
    assert one < two < 2 * one


def test_experts_end_in_tiles_that_are_half_empty() -> None:
    def experts(rows: int) -> float:
        up, down, pairs = (128, 1536, 2048), (128, 2048, 768), 8 * rows
        share = 1 - (1 - 8 / 128) ** rows
        cost = Cost("experts", 2 * pairs * 3 * 768 * 2048, int(share * 2 * 128 * 3 * 768 * 2048))
        return call_seconds(Call("experts", 4 * rows * 2048, cost, rows, 2048, pairs, (up, down)), H200)

    seconds = [experts(rows) for rows in (1, 2, 8, 32, 128, 1024, 8192)]
    assert seconds == sorted(seconds)
    assert seconds[2] < 8 * seconds[0]  # some experts were chosen twice
    assert seconds[-1] < 8 * seconds[-2]


def of_e4m3(rows: int) -> Call:
    """Those of one layer of the stored results, with a scale a row."""
    pairs, read = 8 * rows, (1 - (1 - 8 / 128) ** rows) * 128 * 3 * 768 * 2048
    cost = Cost("experts", 2 * pairs * 3 * 768 * 2048, int(read), narrow=True)
    sizes = (128, 1536, 2048), (128, 2048, 768)
    return Call("repacked_experts", 4 * rows * 2048, cost, rows, 2048, pairs, sizes, narrow=True)


def test_stored_experts_of_an_h200_whose_rows_are_rounded_are_predicted() -> None:
    stored = json.loads((ROOT / "perf" / "results" / "h200-2026-11-30-experts-e4m3.json").read_text())["sections"][0]
    timed = [row for row in stored["rows"] if "hopper_4x256_us" in row]
    assert len(timed) == 7
    for row in timed:
        assert 1e6 * call_seconds(of_e4m3(row["T"]), H200) == pytest.approx(row["hopper_4x256_us"], rel=0.2)


def test_rows_of_experts_are_rounded_on_hopper_alone() -> None:
    elsewhere, many = replace(H200, capability=(10, 0)), of_e4m3(8192)
    wide = replace(many, narrow=False)
    assert call_seconds(many, elsewhere) == call_seconds(wide, elsewhere) == call_seconds(wide, H200)
    assert call_seconds(many, H200) < 0.7 * call_seconds(wide, H200)


def test_a_slower_gpu_takes_longer_by_its_rates() -> None:
    half = replace(H200, bandwidth=H200.bandwidth / 2, flops=H200.flops / 2, narrow_flops=H200.narrow_flops / 2)
    for call in (product(2), product(64), product(8192), Call("rms_norm", 1 << 28)):
        assert call_seconds(call, H200) < call_seconds(call, half) <= 2 * call_seconds(call, H200)
