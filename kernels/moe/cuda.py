"""Experts of a mixture on CUDA: which kernels a step launches, from its sizes alone. Imports Triton."""

from __future__ import annotations

from torch import Tensor

from pagegraph.kernels.gpu import multiprocessors
from pagegraph.kernels.moe.form import ACTIVATIONS, Form
from pagegraph.kernels.moe.gemv import experts_down, experts_up
from pagegraph.kernels.moe.grouped_gemm import grouped_gemm, weighted_sum
from pagegraph.kernels.moe.grouped_gemm_hopper import Scales, grouped_gemm_hopper, takes, takes_e4m3
from pagegraph.kernels.moe.quant_gemv import quant_experts_down, quant_experts_up
from pagegraph.kernels.moe.quant_grouped_gemm import quant_grouped_gemm
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.moe.route import route
from pagegraph.kernels.moe.sorted_rows import sorted_rows
from pagegraph.kernels.moe.tiles import (
    HOPPER_BLOCK_M,
    GemvTiles,
    GroupedTiles,
    HopperTiles,
    QuantGemvTiles,
    e4m3_tiles_of,
    gemv_tiles_of,
    grouped_tiles_of,
    hopper_tiles_of,
    quant_gemv_tiles_of,
    quant_grouped_tiles_of,
)
from pagegraph.kernels.quant.activations import exchanged_e4m3_rows

OTHERS_MULTIPROCESSORS = 132  # a grid for devices of another number: it sets how many tiles a program takes


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    *form: str | float | bool,
    residual: Tensor | None = None,
) -> Tensor:
    """See `kernels.ops`."""
    how = Form(*form)  # type: ignore[arg-type]
    hidden, inner = down.shape[2 if how.transposed else 1], down.shape[1 if how.transposed else 2]
    size = (len(up), inner, hidden, up.element_size())
    tiles: GemvTiles | GroupedTiles | HopperTiles | None = gemv_tiles_of(len(x), size, how.transposed)
    if tiles is None and takes(x, up, down, how):
        tiles = hopper_tiles_of(chosen.numel(), len(up))
    tiles = tiles or grouped_tiles_of(chosen.numel(), size)
    return experts_by(tiles, x, chosen, weights, up, up_bias, down, down_bias, query_start, how, residual=residual)


def experts_by(
    tiles: GemvTiles | GroupedTiles | HopperTiles,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    form: Form,
    programs: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """The op by the given tiles. programs: of a grid of grouped products; 0: as many as run at a time."""
    if not (up.is_contiguous() and down.is_contiguous()):
        raise ValueError("the weights of experts are not contiguous; contiguous() of them is taken")
    x, chosen, weights, live = _given(form, x, chosen, weights, query_start)
    residual = None if residual is None else residual.contiguous()
    if not len(x):
        return x.new_empty(x.shape)
    if isinstance(tiles, GemvTiles):
        inner = experts_up(x, chosen, up, up_bias, live, form, tiles.up)
        return experts_down(inner, chosen, weights, down, down_bias, live, form.transposed, tiles.down, residual)
    choices = chosen.shape[1]
    if isinstance(tiles, HopperTiles):
        routes, programs = route(chosen, len(up), HOPPER_BLOCK_M, live), programs or multiprocessors(x.device)
        of = sorted_rows(x, routes, choices)
        inner = grouped_gemm_hopper(of, of.rows, up, up_bias, routes, form, True, tiles, programs)
        product = grouped_gemm_hopper(of, inner, down, down_bias, routes, form, False, tiles, programs)
        return weighted_sum(product, chosen, weights, len(up), live, residual)
    routes, programs = route(chosen, len(up), tiles.block_m, live), programs or _programs(tiles, x)
    inner = grouped_gemm(x, up, up_bias, routes, choices, form, True, tiles, programs)
    product = grouped_gemm(inner, down, down_bias, routes, choices, form, False, tiles, programs)
    return weighted_sum(product, chosen, weights, len(up), live, residual)


def repacked_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    up_group: int,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    down_group: int,
    down_bias: Tensor | None,
    inner: int,
    query_start: Tensor | None,
    *form: str | float | bool,
    quantize_x: bool = False,
) -> Tensor:
    """See `kernels.ops`."""
    how = Form(*form)  # type: ignore[arg-type]
    hidden, wide = x.shape[1], x.element_size() > 2
    first = QuantStack(up, up_scale, up_zero, up_group, 2 * inner if how.gated else inner, hidden)
    second = QuantStack(down, down_scale, down_zero, down_group, hidden, inner)
    size = (first.tall.kind, len(up), inner, hidden)
    tiles: QuantGemvTiles | GroupedTiles | HopperTiles | None = None if wide else quant_gemv_tiles_of(len(x), size)
    if tiles is None and quantize_x and takes_e4m3(x, first, up_bias, second, down_bias):
        tiles = e4m3_tiles_of(chosen.numel())
    tiles = tiles or quant_grouped_tiles_of(chosen.numel(), size, wide)
    return repacked_experts_by(tiles, x, chosen, weights, first, up_bias, second, down_bias, query_start, how)


def repacked_experts_by(
    tiles: QuantGemvTiles | GroupedTiles | HopperTiles,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: QuantStack,
    up_bias: Tensor | None,
    down: QuantStack,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    form: Form,
    programs: int = 0,
) -> Tensor:
    """As `experts_by`. Weights are contiguous; HopperTiles round rows of both products to e4m3, of what `takes_e4m3` takes."""
    x, chosen, weights, live = _given(form, x, chosen, weights, query_start)
    if not len(x):
        return x.new_empty(x.shape)
    if isinstance(tiles, QuantGemvTiles):
        inner = quant_experts_up(x, chosen, up, up_bias, live, form, tiles.up)
        return quant_experts_down(inner, chosen, weights, down, down_bias, live, tiles.down)
    choices, experts = chosen.shape[1], len(up.qweight)
    if isinstance(tiles, HopperTiles):
        form = form._replace(interleaved=False, transposed=False)
        routes, programs = route(chosen, experts, HOPPER_BLOCK_M, live), programs or multiprocessors(x.device)
        x_q, scale = exchanged_e4m3_rows(x)
        of = sorted_rows(x_q, routes, choices, scale)
        assert of.scales is not None
        scales = Scales(of.scales, up.scale, up.rows, x.dtype)
        inner = grouped_gemm_hopper(of, of.rows, up.qweight, up_bias, routes, form, True, tiles, programs, scales)
        inner, scale = exchanged_e4m3_rows(inner)
        scales = Scales(scale, down.scale, down.rows, x.dtype)
        product = grouped_gemm_hopper(of, inner, down.qweight, down_bias, routes, form, False, tiles, programs, scales)
        return weighted_sum(product, chosen, weights, experts, live)
    programs = programs or _programs(tiles, x)
    routes = route(chosen, experts, tiles.block_m, live)
    inner = quant_grouped_gemm(x, up, up_bias, routes, choices, form, True, tiles, programs)
    product = quant_grouped_gemm(inner, down, down_bias, routes, choices, form, False, tiles, programs)
    return weighted_sum(product, chosen, weights, experts, live)


def _given(
    form: Form, x: Tensor, chosen: Tensor, weights: Tensor, query_start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, chosen and weights as kernels take them, and the number of rows that are no padding, where that is told."""
    if form.activation not in ACTIVATIONS:
        raise ValueError(f"activation {form.activation!r} of experts is not known; 'silu' is")
    live = None if query_start is None else query_start[-1:]
    return x.contiguous(), chosen.contiguous(), weights.contiguous(), live


def _programs(tiles: GroupedTiles, x: Tensor) -> int:
    return tiles.programs * (multiprocessors(x.device) or OTHERS_MULTIPROCESSORS)
