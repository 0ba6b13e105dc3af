"""Layers of experts that are measured: random weights of models' sizes, how they are multiplied, by which tiles, and how far that is off.

Knows no report and no times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import grouped_mm_experts_forward

from pagegraph.compiler.quantization.layouts import RepackedExperts
from pagegraph.compiler.quantization.linear import QuantExperts
from pagegraph.compiler.quantization.online import quantize
from pagegraph.compiler.quantization.stacks import Stack
from pagegraph.kernels.moe import cuda, reference
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.moe.reference import between, in_eights
from pagegraph.kernels.moe.tiles import (
    MAX_GEMV_TOKENS,
    GemvTile,
    GemvTiles,
    GroupedTile,
    GroupedTiles,
    QuantGemvTiles,
    gemv_tiles_of,
    grouped_tiles_of,
    quant_gemv_tiles_of,
    quant_grouped_tiles_of,
)
from pagegraph.kernels.quant.tiles import QuantGemvTile
from pagegraph.kernels.quant.weight import QuantWeight

BANDWIDTH, FLOPS = 4.3e12, 790e12  # of an H200: bytes a second read, operations a second of bfloat16
ROUTINGS = ("random", "all to one", "none of half")
MOST_GEMV_TOKENS = 32
TOLERANCE = 2e-2  # of the largest number of the result
Tiles = Any  # of either way, unquantised or not

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


_QUANT_GEMVS = (  # parts of 16 rows, warps, steps, stages of both products
    ((1, 4, 1, 4), (1, 8, 1, 6)),
    ((1, 8, 2, 3), (1, 16, 1, 4)),
    ((2, 4, 2, 4), (2, 8, 1, 4)),
    ((1, 2, 4, 4), (1, 8, 3, 3)),
)
_QUANT_GROUPED = (  # as above: rows of x, programs, rows of the weight, columns of a step, warps, stages
    (16, 4, 64, 64, 4, 5),
    (16, 2, 128, 128, 4, 4),
    (16, 2, 64, 256, 4, 3),
    (16, 4, 128, 64, 4, 4),
    (16, 3, 128, 128, 8, 3),
    (32, 2, 128, 64, 4, 4),
    (32, 4, 64, 64, 4, 4),
    (64, 3, 64, 128, 4, 3),
    (64, 2, 128, 128, 4, 3),
    (64, 2, 128, 64, 4, 4),
    (64, 2, 128, 192, 8, 3),
    (64, 3, 128, 64, 4, 4),
    (128, 2, 64, 64, 4, 4),
    (128, 1, 128, 128, 8, 3),
    (128, 1, 256, 64, 8, 3),
    (256, 1, 64, 64, 4, 4),
    (256, 1, 128, 64, 8, 4),
)


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
    def size(self) -> tuple[int, int, int]:
        return self.experts, self.inner, self.hidden

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.inner

    def grouped(self, tokens: int, tiles: Iterable[tuple[int, ...]]) -> Iterator[tuple[str, GroupedTiles]]:
        """Those of the tiles, as above, whose rows suit so many tokens."""
        mean = -(-tokens * self.choices // self.experts)
        for block_m, programs, *tile in tiles:
            if block_m <= max(16, mean) and 8 * block_m >= mean:
                yield "grouped", GroupedTiles(block_m, programs, GroupedTile(*tile), GroupedTile(*tile))


GPT_OSS = Form("silu", 1.702, 7.0, 1.0, True, True, True)
MIXTURES = (
    Mixture("128x768", 128, 8, 2048, 768),
    Mixture("gpt_oss", 32, 4, 2880, 2880, GPT_OSS, True),
)


@dataclass
class Layer:
    """Random weights of a mixture on the device, and how they are multiplied."""

    mixture: Mixture
    up: Any
    up_bias: Tensor | None
    down: Any
    down_bias: Tensor | None
    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, mixture: Mixture, device: str, dtype: torch.dtype) -> Layer:
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
            device,
            dtype,
        )

    @property
    def name(self) -> str:
        return self.mixture.name

    @property
    def key(self) -> tuple[Any, ...]:
        """Of the tables."""
        return *self.mixture.size, 2

    def step(self, tokens: int, routing: str = "random") -> tuple[Tensor, Tensor, Tensor]:
        """Rows, choices and weights of a step."""
        mixture = self.mixture
        scores = torch.rand(tokens, mixture.experts, device=self.device)
        if routing == "all to one":  # the rest go where they like
            scores[:, 1] = 2
        elif routing == "none of half":
            scores[:, max(mixture.choices, mixture.experts // 2) :] = -1
        chosen = scores.topk(mixture.choices, dim=1).indices
        weights = torch.rand(tokens, mixture.choices, device=self.device).to(self.dtype)
        return torch.randn(tokens, mixture.hidden, device=self.device).to(self.dtype), chosen, weights

    def ours(self, tiles: Tiles, step: tuple[Tensor, ...], query_start: Tensor | None = None) -> Tensor:
        return cuda.experts_by(
            tiles, *step, self.up, self.up_bias, self.down, self.down_bias, query_start, self.mixture.form
        )

    def exact(self, step: tuple[Tensor, ...], query_start: Tensor | None = None) -> Tensor:
        """The reference in float32."""
        x, chosen, weights = step
        return reference.experts(x.float(), chosen, weights.float(), *self.wide, query_start, *self.mixture.form)

    @cached_property
    def wide(self) -> list[Tensor | None]:
        """Weights and biases in float32."""
        weights = self.up, self.up_bias, self.down, self.down_bias
        return [None if one is None else one.float() for one in weights]

    @property
    def expert_bytes(self) -> float:
        return 2 * self.mixture.expert_weights

    def ways(self, tokens: int) -> Iterator[tuple[str, Tiles]]:
        """The rule's tiles of each way that takes so many tokens."""
        if tokens <= MOST_GEMV_TOKENS:
            few = gemv_tiles_of(1, self.key, self.mixture.form.transposed)
            assert few is not None
            yield "gemv", few
        yield "grouped", grouped_tiles_of(tokens * self.mixture.choices, self.key)

    def candidates(self, tokens: int) -> Iterator[tuple[str, Tiles]]:
        """The rule's first, then others."""
        yield from self.ways(tokens)
        if tokens <= MOST_GEMV_TOKENS:
            for up, down in _TRANSPOSED_GEMVS if self.mixture.form.transposed else _GEMVS:
                yield "gemv", GemvTiles(GemvTile(*up), GemvTile(*down))
        yield from self.mixture.grouped(tokens, _GROUPED)

    def other(self, compiled: bool) -> Callable[..., Tensor]:
        """What ours is compared with: transformers' function, which reads this of a module, as an engine runs it."""
        form = self.mixture.form
        module: Any = SimpleNamespace(
            gate_up_proj=self.up, gate_up_proj_bias=self.up_bias, down_proj=self.down, down_proj_bias=self.down_bias,
            num_experts=self.mixture.experts, has_gate=True, has_bias=self.mixture.bias, is_transposed=form.transposed,
            _apply_gate=lambda product: between(product, form),
        )  # fmt: skip

        def theirs(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            return grouped_mm_experts_forward(module, x, chosen, weights)

        return torch.compile(theirs, dynamic=True, fullgraph=True) if compiled else theirs


@dataclass
class QuantLayer(Layer):
    """The same with quantised weights, as a GPU multiplies them."""

    kind: str = ""

    @classmethod
    def quantised(cls, mixture: Mixture, kind: str, device: str, dtype: torch.dtype) -> QuantLayer:
        form = mixture.form._replace(transposed=False)
        plain = Layer.of(replace(mixture, form=form), device, dtype)
        up_bias = (
            plain.up_bias if plain.up_bias is None or not form.gated else in_eights(plain.up_bias, form.interleaved)
        )
        stacks = []
        for weight, gated in ((plain.up, form.gated), (plain.down, False)):
            held = RepackedExperts(QuantExperts(_quantised(weight, kind), dtype), gated, form.interleaved)
            rows, size = weight.shape[1:]
            stacks.append(QuantStack(held.qweight, held.scale, held.zero, held.group, rows, size))
        return cls(plain.mixture, stacks[0], up_bias, stacks[1], plain.down_bias, device, dtype, kind)

    @property
    def name(self) -> str:
        return f"{self.mixture.name} {self.kind}"

    def ours(self, tiles: Tiles, step: tuple[Tensor, ...], query_start: Tensor | None = None) -> Tensor:
        return cuda.repacked_experts_by(
            tiles, *step, self.up, self.up_bias, self.down, self.down_bias, query_start, self.mixture.form
        )

    @cached_property
    def wide(self) -> list[Tensor | None]:
        up, down = (reference.dequantize(*one[:3], one.group) for one in map(reference.loaded, (self.up, self.down)))
        up_bias = self.up_bias
        if self.mixture.form.gated:  # as the form has them
            up, up_bias = (None if one is None else self._in_order(one) for one in (up, up_bias))
        biases = [None if one is None else one.float() for one in (up_bias, self.down_bias)]
        return [up, biases[0], down, biases[1]]

    def _in_order(self, rows: Tensor) -> Tensor:
        halves = reference.from_eights(rows)
        gate, up = halves.chunk(2, dim=1)
        return torch.stack([gate, up], dim=2).flatten(1, 2) if self.mixture.form.interleaved else halves

    @property
    def expert_bytes(self) -> float:
        parts = [
            one for stack in (self.up, self.down) for one in (stack.qweight, stack.scale, stack.zero) if one is not None
        ]
        return sum(one.nbytes for one in parts) / self.mixture.experts

    @property
    def key(self) -> tuple[Any, ...]:
        return self.up.tall.kind, *self.mixture.size

    def ways(self, tokens: int) -> Iterator[tuple[str, Tiles]]:
        if tokens <= MOST_GEMV_TOKENS and self.dtype != torch.float32:
            few = quant_gemv_tiles_of(min(tokens, MAX_GEMV_TOKENS), self.key)
            assert few is not None
            yield "gemv", few
        yield "grouped", quant_grouped_tiles_of(tokens * self.mixture.choices, self.key, self.dtype == torch.float32)

    def candidates(self, tokens: int) -> Iterator[tuple[str, Tiles]]:
        yield from self.ways(tokens)
        if tokens <= MOST_GEMV_TOKENS:
            for up, down in _QUANT_GEMVS:
                yield "gemv", QuantGemvTiles(QuantGemvTile(*up), QuantGemvTile(*down))
        yield from self.mixture.grouped(tokens, _QUANT_GROUPED)

    def other(self, compiled: bool) -> Callable[..., Tensor]:
        """Our products by unquantised weights."""
        up, up_bias, down, down_bias = (None if one is None else one.to(self.dtype) for one in self.wide)
        del self.wide  # it is large
        form = self.mixture.form
        return lambda *step: cuda.experts(*step, up, up_bias, down, down_bias, None, *form)


def _quantised(weight: Tensor, kind: str) -> QuantWeight:
    """Of random numbers as they are [E, N, K], an expert after another; of MXFP4 codes at random, about as large."""
    experts, rows, size = weight.shape
    if kind == "mxfp4":
        codes = torch.randint(0, 256, (experts, rows, size // 2), dtype=torch.uint8, device=weight.device)
        scale = torch.randint(119, 122, (experts, rows, size // 32), dtype=torch.uint8, device=weight.device)
        return QuantWeight(codes, scale, None, None, 32, rows)
    if kind == "fp8 block":  # a scale for 128 rows and columns
        scale = torch.rand(experts, -(-rows // 128), -(-size // 128), device=weight.device).add_(0.5).div_(64)
        scale = scale.repeat_interleave(128, dim=1)[:, :rows].contiguous()
        return QuantWeight((weight * 64).to(torch.float8_e4m3fn), scale, None, None, 128, rows)
    stack = Stack(experts, rows, weight.device)
    for expert, one in enumerate(weight):
        stack.put(expert, slice(0, rows), quantize(one, kind, "experts"), "experts")
    return stack.weight()


def error_with_padding(layer: Layer, tiles: Tiles, tokens: int, routing: str) -> float:
    """The error of a step whose last two rows are padding that holds NaN; inf where these are not zeros."""
    step, live = layer.step(tokens, routing), max(1, tokens - 2)
    query_start = torch.tensor([0, live], dtype=torch.int32, device=layer.device)
    step[0][live:] = torch.nan
    got = layer.ours(tiles, step, query_start)
    return float("inf") if got[live:].any() else _error(got, layer.exact(step, query_start))


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative to the largest number expected; inf where one is no number."""
    error = ((got.float() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def error_of_replay(layer: Layer, tiles: Tiles, tokens: int) -> float:
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


def floor_seconds(layer: Layer, steps: list[tuple[Tensor, Tensor, Tensor]], flops: float = FLOPS) -> float:
    """Seconds of a step: weights of those that were chosen read once, or all operations at so many a second."""
    mixture, tokens = layer.mixture, len(steps[0][0])
    chosen = sum(len(chosen.unique()) for _, chosen, _ in steps) / len(steps)
    moved = chosen * layer.expert_bytes + 2 * 2 * tokens * mixture.hidden
    operations = 2 * tokens * mixture.choices * mixture.expert_weights
    return max(moved / BANDWIDTH, operations / flops)
