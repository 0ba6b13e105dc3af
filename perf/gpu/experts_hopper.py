"""Grouped products of experts for Hopper: against the reference first, then beside those in Triton. A process of its own.

So a kernel that never ends, or that reads where nothing is, ends that process and none of the section's other rows. The process
prints a line of JSON for each finding, `run` hands them to the report. Knows which mixtures there are from `perf.gpu.experts`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.grouped_gemm_hopper import takes
from pagegraph.kernels.moe.tiles import HopperTiles, grouped_tiles_of
from perf.gpu import experts
from perf.gpu.report import Report, graph_seconds

SECONDS = 150  # for all of it; a kernel that never ends takes them
CHECKED_TOKENS = (1, 65, 300, 1000, 4096)
GRID_TOKENS = (7, 64, 8192)
TOKENS = (256, 1024, 4096, 8192)
STAGES = (4, 3)
CALLS = 4  # of a graph, each with rows and choices of its own
# Checked alone: sizes that fill no tile, and rows that are not a multiple of 16.
GRID = tuple(
    experts.Mixture(f"{count} by {choices} {form}", count, choices, 328, 200, form, form.limit > 0)
    for count, choices, form in (
        (8, 1, experts.GPT_OSS), (8, 8, experts.GPT_OSS._replace(transposed=False)),
        (16, 2, experts.GPT_OSS._replace(interleaved=False, transposed=False)), (64, 6, Form("relu2", gated=False)),
        (128, 8, Form()), (256, 1, Form(gated=False, transposed=True)),
    )
)  # fmt: skip


def run(report: Report) -> None:
    """All of it in a child process, found or not within SECONDS."""
    command = [sys.executable, "-u", "-m", "perf.gpu.experts_hopper"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            out, errors = child.communicate(timeout=SECONDS)
            ended = "" if child.returncode == 0 else f"exit code {child.returncode}: {errors[-1200:]}"
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
            ended = f"killed after {SECONDS} s"
    for line in out.splitlines():
        try:
            kind, found = json.loads(line)
        except ValueError:  # what a library printed, or half a line
            continue
        if kind == "failure":
            report.failure(found)
        else:
            report.row(**found)
    if ended:
        report.failure(f"hopper: {ended}")


def _say(kind: str, found: Any) -> None:
    print(json.dumps([kind, found]), flush=True)


def _check(layer: experts.Layer, counts: tuple[int, ...], in_graphs: bool) -> bool:
    """Full and skewed steps, padding of NaN, and graphs replayed with other choices; whether all were right."""
    worst = 0.0
    for tokens in counts:
        for routing in (*experts.ROUTINGS, "replayed") if in_graphs else experts.ROUTINGS:
            if routing == "replayed":
                error = experts._replayed(layer, HopperTiles(), tokens)
            else:
                error = experts._padded(layer, HopperTiles(), tokens, routing)
            worst = max(worst, error)
            if not error < experts.TOLERANCE:
                _say("failure", f"{layer.name} hopper {tokens} tokens {routing}: off by {error:.3g}")
    _say("row", {"checked": layer.name, "worst_hopper": worst})
    return worst < experts.TOLERANCE


def _measure(layer: experts.Layer) -> None:
    for tokens in TOKENS:
        steps = [layer.step(tokens) for _ in range(CALLS)]
        floor = experts._floor(layer, steps)
        grouped = grouped_tiles_of(tokens * layer.mixture.choices, layer.key)
        ways: dict[str, experts.Tiles] = {"grouped": grouped}
        ways.update({f"hopper_{count}": HopperTiles(count) for count in STAGES})
        us = {}
        for name, tiles in ways.items():
            calls = [lambda step=step, tiles=tiles: layer.ours(tiles, step) for step in steps]
            us[name] = 1e6 * graph_seconds(calls)
        fastest = min(us[f"hopper_{count}"] for count in STAGES)
        found = {
            "floor_us": 1e6 * floor, **{f"{name}_us": one for name, one in us.items()},
            "gain": us["grouped"] / fastest, "hopper_of_floor": fastest / (1e6 * floor),
        }  # fmt: skip
        _say("row", {"mixture": layer.name, "T": tokens, **found})


def main() -> None:
    with torch.inference_mode():
        for mixture in experts.MIXTURES:
            layer = experts.Layer.of(mixture, "cuda", torch.bfloat16)
            assert takes(layer.step(1)[0], layer.up, layer.down, mixture.form)
            if _check(layer, CHECKED_TOKENS, True):
                vars(layer).pop("wide", None)  # it is large
                _measure(layer)
        for mixture in GRID:
            _check(experts.Layer.of(mixture, "cuda", torch.bfloat16), GRID_TOKENS, False)


if __name__ == "__main__":
    main()
