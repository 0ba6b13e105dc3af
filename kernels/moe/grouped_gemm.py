"""Triton: products of many tokens with the weights of their experts, tile by tile of a list that was made on the device.

A program takes tiles until the list ends: the grid is fixed, so a CUDA graph holds it. Of the first product, rows are gathered
where they are loaded and the gate is applied before the result is stored, in the order of experts. The second stores its rows at
their pair of token and choice, and a last kernel adds up each token's choices in order, weighted, in float32: the result does not
depend on timing. Knows nothing of routing but `kernels.moe.route`'s list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.moe.activation import activate, gate_times
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.gemv import choice_of
from pagegraph.kernels.moe.route import Routes
from pagegraph.kernels.moe.tiles import GroupedTiles
from pagegraph.kernels.pdl import dependent, wait

SUM_BLOCK = 1024
REGISTERS = 65536  # of a multiprocessor


@triton.jit(do_not_specialize=["num_slots"])
def grouped_gemm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    num_slots,
    x_stride,
    CHOICES: tl.constexpr,
    N: tl.constexpr,  # of the output
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr,  # of the two products
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    COLUMNS: tl.constexpr = 2 * N if GATED else N
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK_K)
    if PDL:
        wait()
    for work in range(tl.program_id(0), num_slots * TILES_N, tl.num_programs(0)):
        slot = work // TILES_N
        begin = work % TILES_N * BLOCK_N
        expert = tl.load(tiles_ptr + 3 * slot).to(tl.int64)
        first = tl.load(tiles_ptr + 3 * slot + 1)
        last = tl.load(tiles_ptr + 3 * slot + 2)
        if first < last:
            # Rows behind the last are computed of others' numbers and not stored: no mask in the loop.
            m = tl.minimum(first + tl.arange(0, BLOCK_M), last - 1)
            row = tl.load(order_ptr + m) // CHOICES if FIRST else m
            n = begin + tl.arange(0, BLOCK_N)
            column = n // 2 + n % 2 * N if GATED and not INTERLEAVED else n  # gate and up columns in turn
            in_n = n < COLUMNS
            x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + lane[None, :]
            if TRANSPOSED:
                weight_at = weight_ptr + expert * (K * COLUMNS) + column[None, :] + lane[:, None] * COLUMNS
            else:
                weight_at = weight_ptr + expert * (K * COLUMNS) + column[None, :] * K + lane[:, None]
            STEP: tl.constexpr = COLUMNS if TRANSPOSED else 1
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, K, BLOCK_K):
                within = lane < K - k
                if K % BLOCK_K == 0:
                    x = tl.load(x_at + k)
                else:
                    x = tl.load(x_at + k, mask=within[None, :], other=0.0)
                if K % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0:
                    weight = tl.load(weight_at + k * STEP)
                elif K % BLOCK_K == 0:
                    weight = tl.load(weight_at + k * STEP, mask=in_n[None, :], other=0.0)
                else:
                    weight = tl.load(weight_at + k * STEP, mask=in_n[None, :] & within[:, None], other=0.0)
                total = tl.dot(x, weight, total, input_precision=PRECISION)
            if HAS_BIAS:
                total += tl.load(bias_ptr + expert * COLUMNS + column, mask=in_n, other=0.0).to(tl.float32)[None, :]
            m = first + tl.arange(0, BLOCK_M)
            in_m = m < last
            row = m if FIRST else tl.load(order_ptr + m, mask=in_m, other=0)
            if GATED:
                both = total.to(dtype).to(tl.float32).reshape(BLOCK_M, BLOCK_N // 2, 2)
                gate, up = tl.split(both)
                result = gate_times(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
                out_n = begin // 2 + tl.arange(0, BLOCK_N // 2)
            else:
                result = total
                if FIRST:
                    result = activate(total.to(dtype).to(tl.float32), ACTIVATION, ALPHA)
                out_n = n
            out_at = out_ptr + row.to(tl.int64)[:, None] * N + out_n[None, :]
            tl.store(out_at, result.to(dtype), mask=in_m[:, None] & (out_n < N)[None, :])


@triton.jit
def weighted_sum_kernel(
    out_ptr,
    product_ptr,
    chosen_ptr,
    scale_ptr,  # routing weights
    residual_ptr,
    live_ptr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if PDL:
        wait()
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        _, valid = choice_of(chosen_ptr, live_ptr, pair, CHOICES, EXPERTS, HAS_LIVE)
        row = tl.load(product_ptr + pair.to(tl.int64) * N + n, mask=(n < N) & valid, other=0.0)
        scale = tl.load(scale_ptr + pair, mask=valid, other=0.0)
        total += scale.to(tl.float32) * row.to(tl.float32)
    at = token.to(tl.int64) * N + n
    dtype = out_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=n < N, other=0.0).to(tl.float32)
        total = total.to(dtype).to(tl.float32) + residual  # as an addition of its own would
    tl.store(out_ptr + at, total.to(dtype), mask=n < N)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routes: Routes,
    choices: int,
    form: Form,
    first: bool,
    tiles: GroupedTiles,
    programs: int,
) -> Tensor:
    """first: rows of x [T, H] -> [T * k, I] in the order of experts; else those of that order -> [T * k, H] by pair."""
    tile, gated = tiles.up if first else tiles.down, form.gated and first
    columns, size = (weight.shape[2], weight.shape[1]) if form.transposed else weight.shape[1:]
    out_size = columns // 2 if gated else columns
    out = torch.empty(len(routes.order), out_size, dtype=x.dtype, device=x.device)
    slots = len(routes.tiles)
    grouped_gemm_kernel[(min(programs, slots * -(-columns // tile.block_n)),)](
        out,
        x,
        weight,
        bias if bias is not None else weight,
        routes.order,
        routes.tiles,
        slots,
        x.stride(0),
        CHOICES=choices,
        N=out_size,
        K=size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        FIRST=first,
        **form._replace(gated=gated).constants,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=min(255, REGISTERS // (32 * tile.num_warps * tiles.programs)),
        **dependent(x.device),
    )
    return out


def weighted_sum(
    product: Tensor,
    chosen: Tensor,
    weights: Tensor,
    experts: int,
    live: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """product [T * k, H] by pair, and residual [T, H] -> [T, H]; pairs of no expert add nothing, whatever stands there."""
    hidden = product.shape[1]
    out = torch.empty(len(chosen), hidden, dtype=product.dtype, device=product.device)
    block = min(SUM_BLOCK, triton.next_power_of_2(hidden))
    weighted_sum_kernel[len(chosen), -(-hidden // block)](
        out,
        product,
        chosen,
        weights,
        residual if residual is not None else out,
        live if live is not None else chosen,
        CHOICES=chosen.shape[1],
        EXPERTS=experts,
        N=hidden,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        HAS_LIVE=live is not None,
        num_warps=4,
        **dependent(product.device),
    )
    return out
