"""Experts of a mixture on CUDA: which kernels a step launches, from its sizes alone. Imports Triton.

Engines do not come here until the kernels are measured: `DEVICES` of `compiler.model.experts` says so.
"""

from __future__ import annotations

from torch import Tensor

from pagegraph.kernels.gpu import gpu_of, multiprocessors
from pagegraph.kernels.moe.form import ACTIVATIONS, Form
from pagegraph.kernels.moe.gemv import experts_down, experts_up
from pagegraph.kernels.moe.grouped_gemm import grouped_gemm, weighted_sum
from pagegraph.kernels.moe.route import route
from pagegraph.kernels.moe.tiles import GemvTiles, GroupedTiles, gemv_tiles_of, grouped_tiles_of

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
) -> Tensor:
    """See `kernels.ops`."""
    how = Form(*form)  # type: ignore[arg-type]
    hidden, inner = down.shape[2 if how.transposed else 1], down.shape[1 if how.transposed else 2]
    size, gpu = (len(up), inner, hidden, up.element_size()), gpu_of(x.device)
    tiles = gemv_tiles_of(len(x), size, how.transposed, gpu) or grouped_tiles_of(chosen.numel(), size, gpu)
    return experts_by(tiles, x, chosen, weights, up, up_bias, down, down_bias, query_start, how)


def experts_by(
    tiles: GemvTiles | GroupedTiles,
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
) -> Tensor:
    """The op by the given tiles. programs: of a grid of grouped products; 0: as many as run at a time."""
    if form.activation not in ACTIVATIONS:
        raise ValueError(f"activation {form.activation!r} of experts is not known; 'silu' is")
    if not (up.is_contiguous() and down.is_contiguous()):
        raise ValueError("the weights of experts are not contiguous; contiguous() of them is taken")
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
    live = None if query_start is None else query_start[-1:]
    if not len(x):
        return x.new_empty(x.shape)
    if isinstance(tiles, GemvTiles):
        inner = experts_up(x, chosen, up, up_bias, live, form, tiles.up)
        return experts_down(inner, chosen, weights, down, down_bias, live, form.transposed, tiles.down)
    choices = chosen.shape[1]
    programs = programs or tiles.programs * (multiprocessors(x.device) or OTHERS_MULTIPROCESSORS)
    routes = route(chosen, len(up), tiles.block_m, live)
    inner = grouped_gemm(x, up, up_bias, routes, choices, form, True, tiles, programs)
    product = grouped_gemm(inner, down, down_bias, routes, choices, form, False, tiles, programs)
    return weighted_sum(product, chosen, weights, len(up), live)
