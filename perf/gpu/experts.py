"""Experts of a mixture on one CUDA machine: the kernels against the reference first, then against transformers' grouped products.

Prints for each shape and number of tokens what the floor, transformers' products in a compiled graph, and each way of ours take, and
the entries for the tables of `kernels.moe.tiles` that follow. Engines take the kernels where `DEVICES` of `compiler.model.experts` names
"cuda". Knows no model and no jobs. On a CPU, under TRITON_INTERPRET=1, it runs its control flow alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
TOKENS = (1, 8, 32, 256, 4096)
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


MIXTURES = (
    Mixture("128x768", 128, 8, 2048, 768),
    Mixture("gpt_oss", 32, 4, 2880, 2880, Form("silu", 1.702, 7.0, 1.0, True, True, True), True),
)


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

        columns, hidden, inner = 2 * mixture.inner, mixture.hidden, mixture.inner
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

    def step(self, tokens: int, one_expert: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, choices and weights of a step."""
        device, mixture = self.up.device, self.mixture
        scores = torch.rand(tokens, mixture.experts, device=device)
        if one_expert:
            scores[:, 1] = 2
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
        wide = [None if one is None else one.float() for one in (self.up, self.up_bias, self.down, self.down_bias)]
        return reference.experts(x.float(), chosen, weights.float(), *wide, query_start, *self.mixture.form)

    def as_module(self) -> Any:
        """What transformers' function reads of a module."""
        form = self.mixture.form
        return SimpleNamespace(
            gate_up_proj=self.up, gate_up_proj_bias=self.up_bias, down_proj=self.down, down_proj_bias=self.down_bias,
            num_experts=self.mixture.experts, has_gate=True, has_bias=self.mixture.bias, is_transposed=form.transposed,
            _apply_gate=lambda product: between(product, form),
        )  # fmt: skip


def experts(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Correctness of all shapes, then their times."""
    mixtures = MIXTURES
    if args.device == "cpu" or args.tiny:
        mixtures = tuple(replace(one, experts=8, hidden=64, inner=48, choices=2) for one in MIXTURES)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32  # whose products the interpreter knows
    layers = [Layer.of(mixture, args.device, dtype) for mixture in mixtures]
    with torch.inference_mode():
        for layer in layers:
            _check(report, layer, args.device == "cuda")
        if report.sections[-1].get("failures"):
            return
        for layer in layers:
            _measure(report, layer, args)


def _check(report: Report, layer: Layer, on_device: bool) -> None:
    """Both ways, full and skewed steps, padding of NaN, and a graph that is replayed with other choices."""
    worst: dict[str, float] = {}
    for tokens in (1, 3, 8, 33, 300, 1000) if on_device else (1, 9):
        for way, tiles in _ways(layer.mixture, tokens):
            for one_expert in (False, True):
                step = layer.step(tokens, one_expert)
                live = max(1, tokens - 2)
                query_start = torch.tensor([0, live], dtype=torch.int32, device=layer.up.device)
                step[0][live:] = torch.nan
                expected = layer.exact(step, query_start)
                got = layer.ours(tiles, step, query_start)
                error = _error(got, expected)
                worst[way] = max(worst.get(way, 0.0), error)
                if not error < TOLERANCE or got[live:].any():
                    report.failure(f"{layer.mixture.name} {tokens} tokens {tiles} one_expert={one_expert}: {error:.3g}")
            if on_device and (error := _replayed(layer, tiles, tokens)) >= TOLERANCE:
                report.failure(f"{layer.mixture.name} {tokens} tokens {tiles}: a replayed graph is wrong: {error:.3g}")
    report.row(checked=layer.mixture.name, **{f"worst_{way}": error for way, error in worst.items()})


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
    for mine, other in zip(step, layer.step(tokens, one_expert=tokens % 2 == 0), strict=True):
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


def _measure(report: Report, layer: Layer, args: argparse.Namespace) -> None:
    mixture, on_device = layer.mixture, args.device == "cuda"
    module = layer.as_module()

    def theirs(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return grouped_mm_experts_forward(module, x, chosen, weights)

    if on_device and not args.no_compile:  # as an engine runs them
        theirs = torch.compile(theirs, dynamic=True, fullgraph=True)
    for tokens in TOKENS if on_device else (1, 9):
        if report.out_of_time((mixture.name, tokens)):
            return
        steps = [layer.step(tokens) for _ in range(CALLS if on_device else 1)]
        floor = _floor(mixture, steps)
        torch_s = _seconds([lambda step=step: theirs(*step) for step in steps], on_device)
        best: dict[str, tuple[float, Tiles]] = {}
        first: dict[str, float] = {}
        for way, tiles in _candidates(mixture, tokens) if on_device else _ways(mixture, tokens):
            try:
                seconds = _seconds(
                    [lambda step=step, tiles=tiles: layer.ours(tiles, step) for step in steps], on_device
                )
            except Exception as error:  # tiles that this device has no room for
                report.row(show=False, mixture=mixture.name, tokens=tokens, tiles=str(tiles), error=str(error)[:200])
                continue
            report.row(show=False, mixture=mixture.name, tokens=tokens, way=way, tiles=str(tiles), us=1e6 * seconds)
            first.setdefault(way, seconds)
            if way not in best or seconds < best[way][0]:
                best[way] = seconds, tiles
        fastest = min(best, key=lambda way: best[way][0])
        shown = {way: (1e6 * best[way][0] if way in best else "-") for way in ("gemv", "grouped")}
        report.row(
            mixture=mixture.name,
            T=tokens,
            floor_us=1e6 * floor,
            torch_us=1e6 * torch_s,
            gemv_us=shown["gemv"],
            grouped_us=shown["grouped"],
            rule_us=1e6 * first[next(_ways(mixture, tokens))[0]],
            gain=torch_s / best[fastest][0],
            of_floor=best[fastest][0] / floor,
        )
        for way, (_, tiles) in best.items():
            report.fact(**{f"best_{way}_{mixture.name}_{tokens}": str(tuple(tiles))})


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
