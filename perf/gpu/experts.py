"""Experts of a mixture on one CUDA machine: the kernels against the reference first, then against transformers' grouped products.

Prints for each shape and number of tokens what the floor, transformers' products in a compiled graph, and each way of ours take, and
the entries for the tables of `kernels.moe.tiles` that follow. A way that computed something wrong is not timed. Engines take the
kernels where `DEVICES` of `compiler.model.experts` names "cuda", or with --try-experts. Knows no model and no jobs. On a CPU, under
TRITON_INTERPRET=1, it runs its control flow alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import grouped_mm_experts_forward

from pagegraph.kernels.moe import cuda, reference
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.reference import between
from pagegraph.kernels.moe.tiles import (
    GemvTile,
    GemvTiles,
    GroupedTile,
    GroupedTiles,
    gemv_tiles_of,
    grouped_tiles_of,
)
from perf.gpu.report import Report, graph_seconds

BANDWIDTH, FLOPS = 4.3e12, 790e12  # of an H200: bytes a second read, operations a second of bfloat16
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
CHECKED_TOKENS = (1, 3, 8, 33, 300, 1000)
ROUTINGS = ("random", "all to one", "none of half")
CALLS = 16  # of a graph, each with rows and choices of its own: experts come from memory
MOST_GEMV_TOKENS = 32
TOLERANCE = 2e-2  # of the largest number of the result
Tiles = GemvTiles | GroupedTiles


@dataclass(frozen=True)
class Mixture:
    """Sizes of one layer's experts."""

    name: str
    experts: int
    choices: int
    hidden: int
    inner: int
    form: Form = Form()
    bias: bool = False

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.experts, self.inner, self.hidden, 2

    @property
    def expert_bytes(self) -> int:
        return 2 * 3 * self.hidden * self.inner


GPT_OSS = Form("silu", 1.702, 7.0, 1.0, True, True, True)
MIXTURES = (
    Mixture("128x768", 128, 8, 2048, 768),
    Mixture("gpt_oss", 32, 4, 2880, 2880, GPT_OSS, True),
)
# Checked alone: sizes that fill no tile.
GRID = tuple(
    Mixture(f"{experts} by {choices}", experts, choices, 328, 200, form, form.transposed)
    for experts, choices, form in (
        (8, 1, Form()), (8, 8, GPT_OSS), (16, 2, GPT_OSS._replace(transposed=False)), (32, 4, Form("gelu_tanh", transposed=True)),
        (64, 6, Form("relu2", gated=False)), (128, 8, Form()), (256, 1, GPT_OSS), (256, 8, Form()),
    )
)  # fmt: skip
GRID_TOKENS = (1, 7, 64, 8192)


@dataclass
class Layer:
    """Random weights of a mixture on the device."""

    mixture: Mixture
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @classmethod
    def of(cls, mixture: Mixture, device: str, dtype: torch.dtype = torch.bfloat16) -> Layer:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale)

        hidden, inner = mixture.hidden, mixture.inner
        columns = 2 * inner if mixture.form.gated else inner
        up, down = (columns, hidden), (hidden, inner)
        if mixture.form.transposed:
            up, down = up[::-1], down[::-1]
        return cls(
            mixture,
            normal(mixture.experts, *up, scale=hidden**-0.5),
            normal(mixture.experts, columns) if mixture.bias else None,
            normal(mixture.experts, *down, scale=inner**-0.5),
            normal(mixture.experts, hidden) if mixture.bias else None,
        )

    def step(self, tokens: int, routing: str = "random") -> tuple[Tensor, Tensor, Tensor]:
        """Rows, choices and weights of a step."""
        device, mixture = self.up.device, self.mixture
        scores = torch.rand(tokens, mixture.experts, device=device)
        if routing == "all to one":  # the rest go where they like
            scores[:, 1] = 2
        elif routing == "none of half":
            scores[:, max(mixture.choices, mixture.experts // 2) :] = -1
        chosen = scores.topk(mixture.choices, dim=1).indices
        weights = torch.rand(tokens, mixture.choices, device=device).to(self.up.dtype)
        return torch.randn(tokens, mixture.hidden, device=device).to(self.up.dtype), chosen, weights

    def ours(self, tiles: Tiles, step: tuple[Tensor, ...], query_start: Tensor | None = None) -> Tensor:
        mixture = self.mixture
        return cuda.experts_by(
            tiles, *step, self.up, self.up_bias, self.down, self.down_bias, query_start, mixture.form
        )

    def exact(self, step: tuple[Tensor, ...], query_start: Tensor | None = None) -> Tensor:
        """The reference in float32."""
        x, chosen, weights = step
        return reference.experts(x.float(), chosen, weights.float(), *self._wide, query_start, *self.mixture.form)

    @cached_property
    def _wide(self) -> list[Tensor | None]:
        weights = self.up, self.up_bias, self.down, self.down_bias
        return [None if one is None else one.float() for one in weights]

    def as_module(self) -> Any:
        """What transformers' function reads of a module."""
        form = self.mixture.form
        return SimpleNamespace(
            gate_up_proj=self.up, gate_up_proj_bias=self.up_bias, down_proj=self.down, down_proj_bias=self.down_bias,
            num_experts=self.mixture.experts, has_gate=True, has_bias=self.mixture.bias, is_transposed=form.transposed,
            _apply_gate=lambda product: between(product, form),
        )  # fmt: skip


def experts(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Correctness of all shapes, then times of those of models."""
    on_device = args.device == "cuda"
    mixtures, grid, checked, grid_tokens = MIXTURES, GRID, CHECKED_TOKENS, GRID_TOKENS
    if not on_device or args.tiny:
        mixtures = tuple(replace(one, experts=8, hidden=64, inner=48, choices=2) for one in MIXTURES)
        grid, checked, grid_tokens = tuple(replace(one, hidden=40, inner=24) for one in GRID[:4]), (1, 9), (7,)
    dtype = torch.bfloat16 if on_device else torch.float32  # whose products the interpreter knows
    wrong: set[str] = set()
    with torch.inference_mode():
        for mixture in mixtures:
            wrong |= _check(report, Layer.of(mixture, args.device, dtype), checked, on_device)
        for mixture in grid:
            wrong |= _check(report, Layer.of(mixture, args.device, dtype), grid_tokens, False)
        for mixture in mixtures:
            _measure(report, Layer.of(mixture, args.device, dtype), wrong, args)


def _check(report: Report, layer: Layer, counts: tuple[int, ...], in_graphs: bool) -> set[str]:
    """Both ways, full and skewed steps, padding of NaN, and graphs replayed with other choices -> ways that were wrong."""
    worst: dict[str, float] = {}
    wrong: set[str] = set()
    for tokens, (way, tiles) in ((count, one) for count in counts for one in _ways(layer.mixture, count)):
        if report.out_of_time(("checks", layer.mixture.name, tokens)):
            break
        for routing in (*ROUTINGS, "replayed") if in_graphs else ROUTINGS:
            try:
                error = (
                    _replayed(layer, tiles, tokens) if routing == "replayed" else _padded(layer, tiles, tokens, routing)
                )
            except Exception as problem:  # a kernel that is not compiled leaves the others to be tried
                report.failure(f"{layer.mixture.name} {tokens} tokens {tiles} {routing}: {problem!r}"[:600])
                error = float("inf")
            worst[way] = max(worst.get(way, 0.0), error)
            if not error < TOLERANCE:
                wrong.add(way)
                report.failure(f"{layer.mixture.name} {tokens} tokens {tiles} {routing}: off by {error:.3g}")
    report.row(checked=layer.mixture.name, **{f"worst_{way}": worst.get(way, "-") for way in ("gemv", "grouped")})
    return wrong


def _padded(layer: Layer, tiles: Tiles, tokens: int, routing: str) -> float:
    """The error of a step whose last two rows are padding that holds NaN; inf where these are not zeros."""
    step, live = layer.step(tokens, routing), max(1, tokens - 2)
    query_start = torch.tensor([0, live], dtype=torch.int32, device=layer.up.device)
    step[0][live:] = torch.nan
    got = layer.ours(tiles, step, query_start)
    return float("inf") if got[live:].any() else _error(got, layer.exact(step, query_start))


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative to the largest number expected; inf where one is no number."""
    error = ((got.float() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def _replayed(layer: Layer, tiles: Tiles, tokens: int) -> float:
    """The error of a graph captured with choices other than those of its replay."""
    step = layer.step(tokens)
    layer.ours(tiles, step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.ours(tiles, step)
    for mine, other in zip(step, layer.step(tokens, "all to one"), strict=True):
        mine.copy_(other)
    graph.replay()
    return _error(out, layer.exact(step))


def _ways(mixture: Mixture, tokens: int) -> Iterator[tuple[str, Tiles]]:
    """The rule's tiles of each way that takes so many tokens."""
    if tokens <= MOST_GEMV_TOKENS:
        few = gemv_tiles_of(1, mixture.size, mixture.form.transposed)
        assert few is not None
        yield "gemv", few
    yield "grouped", grouped_tiles_of(tokens * mixture.choices, mixture.size)


def _candidates(mixture: Mixture, tokens: int) -> Iterator[tuple[str, Tiles]]:
    """The rule's first, then others."""
    yield from _ways(mixture, tokens)
    if tokens <= MOST_GEMV_TOKENS:
        for up, down in _TRANSPOSED_GEMVS if mixture.form.transposed else _GEMVS:
            yield "gemv", GemvTiles(GemvTile(*up), GemvTile(*down))
    mean = -(-tokens * mixture.choices // mixture.experts)
    for block_m, programs, *tile in _GROUPED:
        if block_m <= max(16, mean) and 8 * block_m >= mean:
            yield "grouped", GroupedTiles(block_m, programs, GroupedTile(*tile), GroupedTile(*tile))


_GEMVS = (
    ((2, 1024, 4), (2, 256, 2, 8)),
    ((8, 512, 8), (8, 256, 8, 4)),
    ((4, 1024, 8), (4, 256, 4, 8)),
    ((4, 256, 2), (4, 256, 4, 2)),
)
_TRANSPOSED_GEMVS = (
    ((16, 64, 4), (16, 64, 4, 4)),
    ((32, 64, 8), (32, 128, 8, 4)),
    ((16, 256, 8), (16, 128, 8, 2)),
)
_GROUPED = (  # rows, programs a multiprocessor, columns, columns of the weight of a step, warps, stages
    (16, 3, 64, 64, 4, 6),
    (16, 2, 64, 128, 4, 4),
    (16, 1, 128, 128, 8, 5),
    (16, 4, 128, 64, 4, 3),
    (32, 3, 128, 64, 4, 3),
    (32, 2, 64, 128, 4, 4),
    (64, 2, 128, 64, 4, 4),
    (64, 1, 256, 64, 8, 4),
    (128, 1, 256, 64, 8, 3),
    (128, 1, 128, 128, 8, 3),
    (128, 2, 128, 64, 4, 3),
)


def _measure(report: Report, layer: Layer, wrong: set[str], args: argparse.Namespace) -> None:
    """One line a number of tokens, then the entries of both tables."""
    mixture, on_device = layer.mixture, args.device == "cuda"
    module = layer.as_module()

    def theirs(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return grouped_mm_experts_forward(module, x, chosen, weights)

    if on_device and not args.no_compile:  # as an engine runs them
        theirs = torch.compile(theirs, dynamic=True, fullgraph=True)
    best: dict[int, dict[str, tuple[float, Tiles]]] = {}
    for tokens in TOKENS if on_device else (1, 9):
        if report.out_of_time((mixture.name, tokens)):
            break
        steps = [layer.step(tokens) for _ in range(CALLS if on_device else 1)]
        floor = _floor(mixture, steps)
        cell = {"mixture": mixture.name, "T": tokens}
        torch_s = _tried(
            report, {**cell, "way": "torch"}, [lambda step=step: theirs(*step) for step in steps], on_device
        )
        found = best[tokens] = {}
        first: dict[str, float] = {}
        for way, tiles in _candidates(mixture, tokens) if on_device else _ways(mixture, tokens):
            if way in wrong or report.time_is_over():
                continue
            calls = [lambda step=step, tiles=tiles: layer.ours(tiles, step) for step in steps]
            seconds = _tried(report, {**cell, "way": way, "tiles": str(tiles)}, calls, on_device)
            first.setdefault(way, seconds)
            if seconds < found.get(way, (float("inf"),))[0]:
                found[way] = seconds, tiles
        fastest = min((seconds for seconds, _ in found.values()), default=float("nan"))
        report.row(
            **cell, floor_us=1e6 * floor, torch_us=1e6 * torch_s,
            **{f"{way}_us": 1e6 * found[way][0] if way in found else "-" for way in ("gemv", "grouped")},
            rule_us=1e6 * next(iter(first.values()), float("nan")), gain=torch_s / fastest, of_floor=fastest / floor,
        )  # fmt: skip
    for table, entry in _entries(mixture, best).items():
        report.fact(**{f"{table}_{mixture.name}": f"{mixture.size}: {entry}"})


def _tried(report: Report, cell: dict[str, object], calls: list[Callable[[], object]], on_device: bool) -> float:
    """Seconds of a call; nan where it fails: tiles that a device has no room for."""
    try:
        seconds = _seconds(calls, on_device)
    except Exception as error:
        report.row(show=False, **cell, error=f"{type(error).__name__}: {error}"[:300])
        return float("nan")
    report.row(show=False, **cell, us=1e6 * seconds)
    return seconds


def _entries(mixture: Mixture, best: dict[int, dict[str, tuple[float, Tiles]]]) -> dict[str, dict[int, Tiles | None]]:
    """What the tables of `kernels.moe.tiles` take of the fastest tiles."""
    gemv: dict[int, Tiles | None] = {}
    grouped: dict[int, Tiles | None] = {}
    for tokens, found in best.items():
        if "grouped" in found:
            grouped[-(-tokens * mixture.choices // mixture.experts)] = found["grouped"][1]
        if "gemv" in found:
            slower = "grouped" in found and found["grouped"][0] < found["gemv"][0]
            gemv[tokens] = None if slower else found["gemv"][1]
    return {"GEMV_TABLE": gemv, "GROUPED_TABLE": grouped}


def _floor(mixture: Mixture, steps: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Seconds of a step: weights of those that were chosen read once, or all operations."""
    tokens = len(steps[0][0])
    chosen = sum(len(chosen.unique()) for _, chosen, _ in steps) / len(steps)
    moved = chosen * mixture.expert_bytes + 2 * 2 * tokens * mixture.hidden
    operations = 2 * tokens * mixture.choices * 3 * mixture.hidden * mixture.inner
    return max(moved / BANDWIDTH, operations / FLOPS)


def _seconds(calls: list[Callable[[], object]], on_device: bool) -> float:
    if on_device:
        return graph_seconds(calls)
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)
