"""Grouped products of experts for Hopper: against the reference first, then beside those in Triton. A process of its own.

    python -m perf.gpu.experts_hopper e4m3    # by e4m3, rows rounded too, beside those that dequantise weights; else 16 bits

So a kernel that never ends, or that reads where nothing is, ends that process and none of the section's other rows. The process
prints a line of JSON for each finding, `run` hands them to the report. Knows which mixtures there are from `perf.gpu.expert_layers`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.grouped_gemm_hopper import takes, takes_e4m3
from pagegraph.kernels.moe.tiles import HopperTiles, e4m3_tiles_of, grouped_tiles_of, quant_grouped_tiles_of
from perf.gpu import expert_layers as layers
from perf.gpu.report import Report, graph_seconds

SECONDS = 150  # for all of it; a kernel that never ends takes them
CHECKED_TOKENS = (1, 65, 300, 1000, 4096)
GRID_TOKENS = (7, 64, 8192)
TOKENS = (256, 1024, 4096, 8192)
E4M3_TOKENS = (16, 32, 64, 256, 2048, 8192, 65536)
TILES = (HopperTiles(), HopperTiles(3))
E4M3_TILES = (HopperTiles(), HopperTiles(3), HopperTiles(6, 128), HopperTiles(5, 128))
E4M3_TOLERANCE = 8e-2  # rows are rounded to 3 bits behind the point
E4M3_FLOPS = 1300e12  # operations a second that large products of e4m3 are expected to reach on an H200
CALLS = 4  # of a graph, each with rows and choices of its own
# Checked alone: sizes that fill no tile, and rows that are not a multiple of 16.
GRID = tuple(
    layers.Mixture(f"{count} by {choices} {form}", count, choices, 328, 200, form, form.limit > 0)
    for count, choices, form in (
        (8, 1, layers.GPT_OSS), (8, 8, layers.GPT_OSS._replace(transposed=False)),
        (16, 2, layers.GPT_OSS._replace(interleaved=False, transposed=False)), (64, 6, Form("relu2", gated=False)),
        (128, 8, Form()), (256, 1, Form(gated=False, transposed=True)),
    )
)  # fmt: skip


def run(report: Report, *what: str) -> None:
    """All of it in a child process, found or not within SECONDS; `what` as its arguments."""
    command = [sys.executable, "-u", "-m", "perf.gpu.experts_hopper", *what]
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


def _check(layer: layers.Layer, counts: tuple[int, ...], in_graphs: bool, tiles: HopperTiles = HopperTiles()) -> bool:
    """Full and skewed steps, padding of NaN, and graphs replayed with other choices; whether all were right."""
    worst, tolerance = 0.0, E4M3_TOLERANCE if isinstance(layer, layers.QuantLayer) else layers.TOLERANCE
    for tokens in counts:
        for routing in (*layers.ROUTINGS, "replayed") if in_graphs else layers.ROUTINGS:
            if routing == "replayed":
                error = layers.error_of_replay(layer, tiles, tokens)
            else:
                error = layers.error_with_padding(layer, tiles, tokens, routing)
            worst = max(worst, error)
            if not error < tolerance:
                _say("failure", f"{layer.name} {tiles} {tokens} tokens {routing}: off by {error:.3g}")
    _say("row", {"checked": layer.name, "tiles": str(tiles), "worst_hopper": worst})
    return worst < tolerance


def _measure(layer: layers.Layer) -> None:
    of_e4m3 = isinstance(layer, layers.QuantLayer)
    for tokens in E4M3_TOKENS if of_e4m3 else TOKENS:
        steps = [layer.step(tokens) for _ in range(CALLS)]
        pairs = tokens * layer.mixture.choices
        floor = layers.floor_seconds(layer, steps, E4M3_FLOPS if of_e4m3 else layers.FLOPS)
        grouped = quant_grouped_tiles_of(pairs, layer.key, False) if of_e4m3 else grouped_tiles_of(pairs, layer.key)
        ways: dict[str, layers.Tiles] = {"w8a16" if of_e4m3 else "grouped": grouped}
        ways.update({f"hopper_{one.stages}x{one.block_n}": one for one in (E4M3_TILES if of_e4m3 else TILES)})
        us = {}
        for name, tiles in ways.items():
            calls = [lambda step=step, tiles=tiles: layer.ours(tiles, step) for step in steps]
            us[name] = 1e6 * graph_seconds(calls)
        other, *ours = us
        fastest = min(ours, key=lambda name: us[name])
        found = {
            "floor_us": 1e6 * floor, **{f"{name}_us": one for name, one in us.items()}, "fastest": fastest,
            "gain": us[other] / us[fastest], "hopper_of_floor": us[fastest] / (1e6 * floor),
        }  # fmt: skip
        _say("row", {"mixture": layer.name, "T": tokens, **found})


def _of_16_bits() -> None:
    for mixture in layers.MIXTURES:
        layer = layers.Layer.of(mixture, "cuda", torch.bfloat16)
        assert takes(layer.step(1)[0], layer.up, layer.down, mixture.form)
        if _check(layer, CHECKED_TOKENS, True):
            vars(layer).pop("wide", None)  # it is large
            _measure(layer)
    for mixture in GRID:
        _check(layers.Layer.of(mixture, "cuda", torch.bfloat16), GRID_TOKENS, False)


def _of_e4m3() -> None:
    """Of the first mixture, with a scale a row."""
    mixture = layers.MIXTURES[0]
    layer = layers.QuantLayer.quantised(mixture, "fp8", "cuda", torch.bfloat16)
    assert takes_e4m3(layer.step(1)[0], layer.up, layer.up_bias, layer.down, layer.down_bias)
    assert e4m3_tiles_of(E4M3_TOKENS[0] * mixture.choices) is not None
    right = [_check(layer, CHECKED_TOKENS, True), *(_check(layer, (33, 1000), False, one) for one in E4M3_TILES[1:])]
    if all(right):
        vars(layer).pop("wide", None)
        _measure(layer)


def main() -> None:
    with torch.inference_mode():
        if sys.argv[1:] == ["e4m3"]:
            _of_e4m3()
        else:
            _of_16_bits()


if __name__ == "__main__":
    main()
