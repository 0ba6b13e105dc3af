"""Triton: x @ weight.T in which a row of x gives the same bits however many rows there are.

One tile for every number of rows, and columns in parts whose number follows from the weight's shape. A part is added up from
left to right, then parts in their order: of few rows each part is a program's, and the last to arrive adds them; of many rows
one program computes them one after the other. Knows no models.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.split_k import is_last_arriver, partial_buffers, reduce_partials
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.pdl import dependent, wait

PROGRAMS = 264  # two on each multiprocessor of an H100 or H200
MOST_PARTS = 8
LEAST_COLUMNS = 512  # of a part


@triton.jit
def _columns_of(
    x_at,
    weight_at,
    in_t,
    in_n,
    lane,
    begin,
    end,
    total,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total [BLOCK_N, BLOCK_T] plus the products of columns begin to end."""
    for k in range(begin, end, BLOCK_K):
        if K % BLOCK_K == 0:
            weight = tl.load(weight_at + k, mask=in_n[:, None], other=0.0)
            x = tl.load(x_at + k, mask=in_t[None, :], other=0.0)
        else:
            inside = lane < K - k
            weight = tl.load(weight_at + k, mask=in_n[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_at + k, mask=in_t[None, :] & inside[:, None], other=0.0)
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def fixed_gemm_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, BLOCK_T)  # those that read the same weights run side by side
    n = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(0) % row_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    in_n, in_t = n < N, t < num_rows
    lane = tl.arange(0, BLOCK_K)
    span: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    weight_at = weight_ptr + n.to(tl.int64)[:, None] * K + lane[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + lane[:, None]
    if PDL:
        wait()
    zeros = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if SPREAD:
        begin = tl.program_id(1) * span
        total = _columns_of(
            x_at, weight_at, in_t, in_n, lane, begin, min(begin + span, K), zeros, K, BLOCK_K, PRECISION
        )
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last_arriver(
            total, partial_ptr, counter_ptr, tl.program_id(0), tl.program_id(1), at, PARTS, BLOCK_N, BLOCK_T
        ):
            return
        total = reduce_partials(partial_ptr, counter_ptr, tl.program_id(0), at, PARTS, BLOCK_N, BLOCK_T)
    else:
        total = zeros
        for part in range(PARTS):
            begin = part * span
            total += _columns_of(
                x_at, weight_at, in_t, in_n, lane, begin, min(begin + span, K), zeros, K, BLOCK_K, PRECISION
            )
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_t[None, :])


def tile_of(out_size: int, size: int, element_size: int) -> Tile:
    """How products with a weight [out_size, size] are cut, whatever the rows; its split_k is the number of parts."""
    block_n, block_t, block_k = (128, 64, 64) if element_size == 2 else (64, 32, 32)
    wanted = -(-PROGRAMS // -(-out_size // block_n))
    parts = max(1, min(wanted, MOST_PARTS, size // LEAST_COLUMNS))
    return Tile(block_n, block_k, 1 << (parts.bit_length() - 1), 4, 3, block_t)


def fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `kernels.ops`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out_size, size = weight.shape
    tile = tile_of(out_size, size, weight.element_size())
    out = torch.empty(len(rows), out_size, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(out_size, tile.block_n) * triton.cdiv(len(rows), tile.block_t)
    spread = tile.split_k > 1 and len(rows) <= tile.block_t
    partial, counters = partial_buffers(tile, programs, tile.block_t, out) if spread else (out, out)
    fixed_gemm_kernel[programs, tile.split_k if spread else 1](
        out,
        partial,
        counters,
        rows,
        weight.contiguous(),
        bias if bias is not None else weight,
        len(rows),
        rows.stride(0),
        N=out_size,
        K=size,
        BLOCK_T=tile.block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PARTS=tile.split_k,
        SPREAD=spread,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out.view(*x.shape[:-1], -1)
