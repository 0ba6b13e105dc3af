"""Unquantised linears on CUDA: which kernels a step launches, from its sizes alone. Imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.gpu import gpu_of, multiprocessors
from pagegraph.kernels.linear.gated_gemm_hopper import gated_gemm, takes
from pagegraph.kernels.linear.gemv import gemv
from pagegraph.kernels.linear.rms_norm import add_rms_norm, rms_norm
from pagegraph.kernels.linear.silu_mul import silu_mul
from pagegraph.kernels.linear.skinny_gemm import skinny_gemm
from pagegraph.kernels.linear.tiles import GemvTile, gemv_tile_of, last_round_of, tile_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
    """See `kernels.ops`."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.element_size() == 2 and weight.is_contiguous() and rows.stride(1) == 1:
        count, shape, gpu = len(rows), weight.shape, gpu_of(x.device)
        if gemv_tile := gemv_tile_of(count, *shape, gpu=gpu, gated=gated):
            return gemv(rows, weight, bias, gemv_tile, gated=gated).view(*x.shape[:-1], -1)
        if tile := tile_of(count, *shape, gpu=gpu):
            return skinny_gemm(rows, weight, bias, tile, gated=gated).view(*x.shape[:-1], -1)
        programs = multiprocessors(x.device)
        if gated and programs and bias is None and takes(rows, weight):
            last_round = last_round_of(count, *shape, programs=programs, gpu=gpu)
            if last_round is not None:
                out = gated_gemm(rows, weight, programs, narrow=last_round == "narrow")
                return out.view(*x.shape[:-1], -1)
    product = functional.linear(x, weight, bias)
    return silu_mul(product) if gated else product


def linear_norm_linear(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    second: Tensor,
    second_bias: Tensor | None,
    gated: bool,
    keep_norm: bool,
    query_start: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.ops`. For a few rows two kernels, else a kernel for each of its parts."""
    tiles = _gemv_tiles(x, first, residual, second, gated)
    if tiles is None:
        total, normed = add_rms_norm(residual, linear(x, first, first_bias), norm, eps)
        out = linear(normed, second, second_bias, gated=gated)
        return total, out, normed if keep_norm else normed.new_empty(0)
    rows = x.reshape(-1, x.shape[-1])
    total = gemv(rows, first, first_bias, tiles[0], residual=residual.reshape(len(rows), -1), query_start=query_start)
    normed = torch.empty_like(residual) if keep_norm else None
    out = gemv(
        total, second, second_bias, tiles[1], norm=norm, eps=eps, gated=gated, query_start=query_start, normed=normed
    )
    return total.view(residual.shape), out.view(*x.shape[:-1], -1), total.new_empty(0) if normed is None else normed


def norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool, query_start: Tensor
) -> Tensor:
    """See `kernels.ops`. For a few rows one kernel."""
    rows = x.reshape(-1, x.shape[-1])
    dense = weight.element_size() == 2 and weight.is_contiguous() and rows.is_contiguous()
    tile = gemv_tile_of(len(rows), *weight.shape, gpu=gpu_of(x.device), gated=gated) if dense else None
    if tile is None:
        return linear(rms_norm(x, norm, eps), weight, bias, gated=gated)
    out = gemv(rows, weight, bias, tile, norm=norm, eps=eps, gated=gated, query_start=query_start)
    return out.view(*x.shape[:-1], -1)


def _gemv_tiles(
    x: Tensor, first: Tensor, residual: Tensor, second: Tensor, gated: bool
) -> tuple[GemvTile, GemvTile] | None:
    """How both linears are cut where all they read suits `gemv`."""
    dense = all(one.is_contiguous() for one in (x, first, residual, second))
    if not dense or first.element_size() != 2 or second.element_size() != 2:
        return None
    rows = x.numel() // x.shape[-1]
    gpu = gpu_of(x.device)
    one, other = gemv_tile_of(rows, *first.shape, gpu=gpu), gemv_tile_of(rows, *second.shape, gpu=gpu, gated=gated)
    return (one, other) if one and other else None
