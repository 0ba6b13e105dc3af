"""Experts of a mixture on one CUDA machine: the kernels against the reference first, then against other products.

Those are transformers' grouped products in a compiled graph; of quantised weights (section quantized_experts) ours by unquantised ones.
Prints for each shape and number of tokens what the floor, the others, and each way of ours take, and the fastest tiles, which the
rules of `kernels.moe.tiles` follow. A way that computed something wrong is not timed. Products for Hopper are `perf.gpu.experts_hopper`'s.
Knows no model and no jobs. On a CPU, under TRITON_INTERPRET=1, it runs its control flow alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from pagegraph.kernels.gpu import multiprocessors
from pagegraph.kernels.moe.form import Form
from perf.gpu import experts_hopper
from perf.gpu.expert_layers import (
    GPT_OSS,
    MIXTURES,
    ROUTINGS,
    TOLERANCE,
    Layer,
    Mixture,
    QuantLayer,
    Tiles,
    error_of_replay,
    error_with_padding,
    floor_seconds,
)
from perf.gpu.report import Report, graph_seconds

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
CHECKED_TOKENS = (1, 3, 8, 33, 300, 1000)
CALLS = 16  # of a graph, each with rows and choices of its own: experts come from memory
KINDS = [
    "fp8",
    "fp8 block",
    "int4",
    "int8",
    "mxfp4",
]  # of quantised weights; fp8, int4 and int8 as they are made while loading
QUANTISED = [(0, "fp8"), (0, "fp8 block"), (0, "int4"), (1, "mxfp4")]  # of MIXTURES
# Checked alone: sizes that fill no tile.
GRID = tuple(
    Mixture(f"{experts} by {choices}", experts, choices, 328, 200, form, form.transposed)
    for experts, choices, form in (
        (8, 1, Form()), (8, 8, GPT_OSS), (16, 2, GPT_OSS._replace(transposed=False)), (32, 4, Form("gelu_tanh", transposed=True)),
        (64, 6, Form("relu2", gated=False)), (128, 8, Form()), (256, 1, GPT_OSS), (256, 8, Form()),
    )
)  # fmt: skip
GRID_TOKENS = (1, 7, 64, 8192)


def experts(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Correctness of all shapes, then times of those of models."""
    if args.device == "cuda" and multiprocessors(torch.device("cuda")):
        experts_hopper.run(report)
    _run(report, args, [(mixture, "") for mixture in MIXTURES], [(mixture, "") for mixture in GRID])


def quantized_experts(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """The same with quantised weights, each of the kinds that models come in or that are made while loading."""
    if args.device == "cuda" and multiprocessors(torch.device("cuda")):
        experts_hopper.run(report, "e4m3")
    whole = [replace(one, hidden=320, inner=192) for one in GRID]  # groups of 32 columns
    _run(report, args, [(MIXTURES[at], kind) for at, kind in QUANTISED], list(zip(whole, 2 * KINDS)))


def _run(report: Report, args: argparse.Namespace, of_models: list[tuple], grid: list[tuple]) -> None:
    on_device = args.device == "cuda"
    checked, grid_tokens = CHECKED_TOKENS, GRID_TOKENS
    if not on_device or args.tiny:
        of_models = [(replace(one, experts=8, hidden=64, inner=64, choices=2), kind) for one, kind in of_models]
        grid = [(replace(one, hidden=64, inner=32, experts=8), kind) for one, kind in grid[:4] if one.choices <= 8]
        checked, grid_tokens = (1, 5), (3,)
    dtype = torch.bfloat16 if on_device else torch.float32  # whose products the interpreter knows
    wrong: dict[str, set[str]] = {}  # by kind

    def layer_of(mixture: Mixture, kind: str) -> Layer:
        plain = Layer.of if not kind else QuantLayer.quantised
        return plain(mixture, *([kind] if kind else []), args.device, dtype)

    with torch.inference_mode():
        for one in of_models:
            wrong.setdefault(one[1], set()).update(_check(report, layer_of(*one), checked, on_device))
        for one in grid:
            wrong.setdefault(one[1], set()).update(_check(report, layer_of(*one), grid_tokens, False))
        for one in of_models:
            _measure(report, layer_of(*one), wrong[one[1]], args)


def _check(report: Report, layer: Layer, counts: tuple[int, ...], in_graphs: bool) -> set[str]:
    """Both ways, full and skewed steps, padding of NaN, and graphs replayed with other choices -> ways that were wrong."""
    worst: dict[str, float] = {}
    wrong: set[str] = set()
    for tokens, (way, tiles) in ((count, one) for count in counts for one in layer.ways(count)):
        if report.out_of_time(("checks", layer.name, tokens)):
            break
        for routing in (*ROUTINGS, "replayed") if in_graphs else ROUTINGS:
            try:
                error = (
                    error_of_replay(layer, tiles, tokens)
                    if routing == "replayed"
                    else error_with_padding(layer, tiles, tokens, routing)
                )
            except Exception as problem:  # a kernel that is not compiled leaves the others to be tried
                report.failure(f"{layer.name} {tokens} tokens {tiles} {routing}: {problem!r}"[:600])
                error = float("inf")
            worst[way] = max(worst.get(way, 0.0), error)
            if not error < TOLERANCE:
                wrong.add(way)
                report.failure(f"{layer.name} {tokens} tokens {tiles} {routing}: off by {error:.3g}")
    report.row(checked=layer.name, **{f"worst_{way}": worst.get(way, "-") for way in ("gemv", "grouped")})
    return wrong


def _measure(report: Report, layer: Layer, wrong: set[str], args: argparse.Namespace) -> None:
    """One line a number of tokens, then the fastest tiles of both ways."""
    on_device = args.device == "cuda"
    other = layer.other(on_device and not args.no_compile)
    best: dict[int, dict[str, tuple[float, Tiles]]] = {}
    for tokens in TOKENS if on_device else (1, 9):
        if report.out_of_time((layer.name, tokens)):
            break
        steps = [layer.step(tokens) for _ in range(CALLS if on_device else 1)]
        floor = floor_seconds(layer, steps)
        cell = {"mixture": layer.name, "T": tokens}
        other_s = _tried(
            report, {**cell, "way": "other"}, [lambda step=step: other(*step) for step in steps], on_device
        )
        found = best[tokens] = {}
        first: dict[str, float] = {}
        for way, tiles in layer.candidates(tokens) if on_device else layer.ways(tokens):
            if way in wrong or report.time_is_over():
                continue
            calls = [lambda step=step, tiles=tiles: layer.ours(tiles, step) for step in steps]
            seconds = _tried(report, {**cell, "way": way, "tiles": str(tiles)}, calls, on_device)
            first.setdefault(way, seconds)
            if seconds < found.get(way, (float("inf"),))[0]:
                found[way] = seconds, tiles
        fastest = min((seconds for seconds, _ in found.values()), default=float("nan"))
        report.row(
            **cell, floor_us=1e6 * floor, other_us=1e6 * other_s,
            **{f"{way}_us": 1e6 * found[way][0] if way in found else "-" for way in ("gemv", "grouped")},
            rule_us=1e6 * next(iter(first.values()), float("nan")), gain=other_s / fastest, of_floor=fastest / floor,
        )  # fmt: skip
    for way in ("gemv", "grouped"):
        tiles = {tokens: str(found[way][1]) for tokens, found in best.items() if way in found}
        report.fact(**{f"fastest tiles of {layer.name}, {way}": tiles})


def _tried(report: Report, cell: dict[str, object], calls: list[Callable[[], object]], on_device: bool) -> float:
    """Seconds of a call; nan where it fails: tiles that a device has no room for."""
    try:
        seconds = _seconds(calls, on_device)
    except Exception as error:
        report.row(show=False, **cell, error=f"{type(error).__name__}: {error}"[:300])
        return float("nan")
    report.row(show=False, **cell, us=1e6 * seconds)
    return seconds


def _seconds(calls: list[Callable[[], object]], on_device: bool) -> float:
    if on_device:
        return graph_seconds(calls)
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)
