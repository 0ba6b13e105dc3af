"""Triton: x @ weight.T for one to four rows of x, with what stands around it: a norm, a residual, a gate.

Without tensor cores: each program multiplies a few rows of the weight by all of x and adds up at the end, so a product is one
pass over the weight with nothing to merge. A bucket of two rows that holds one costs no more than one. The first weights are asked for before the kernel waits for those before it.
The norm of x costs no pass of its own: its scale is one number a row, which is known when the product is. Knows no models;
which shapes are cut how is data in `kernels/linear/tiles.py`.

`linear_norm_linear` spans linear, residual, norm, linear and gate between two attentions. For up to four rows it is
two kernels without tensor cores, each one pass over a weight; for more rows a kernel a part. Capture sizes of one and
two sequences would need two compilations; instead the kernels of two read how many rows are live and leave the other
out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.silu_mul import silu_times
from pagegraph.kernels.linear.tiles import GemvTile
from pagegraph.kernels.pdl import dependent, wait


@triton.jit
def _weights(at, k, lane, inside, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k to k + BLOCK_K of a tile's rows; zeros past the end, which is asked for one tile too far."""
    if K % BLOCK_K == 0:
        seen = inside & (k < K)
    else:
        seen = inside & (k + lane < K)
    return tl.load(at + k, mask=seen, other=0.0, eviction_policy="evict_first")


@triton.jit
def _within_threads(products):
    """[N, BLOCK_K] -> [N, BLOCK_K / 8]: sums of the eight neighbours that a thread has loaded together."""
    return tl.sum(products.reshape(products.shape[0], products.shape[1] // 8, 8), 2)


@triton.jit
def _add(total, squares, weight, x_at, lane, k, gain, K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_NORM: tl.constexpr):
    """A tile's products with one row of x."""
    if K % BLOCK_K == 0:
        x = tl.load(x_at + k).to(tl.float32)
    else:
        x = tl.load(x_at + k, mask=k + lane < K, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares += _within_threads(x * x)
        x = x * gain
    return total + _within_threads(weight * x), squares


@triton.jit
def _finish(
    total, squares, row, n, inside, out_ptr, bias, residual_ptr, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One row of the output from its products; rounds where kernels of their own would."""
    dtype = out_ptr.dtype.element_ty
    sums = tl.sum(total, 1)
    if HAS_NORM:
        sums = sums * tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
    sums = (sums + bias).to(dtype).to(tl.float32)
    if GATED:
        gate, up = tl.split(sums.reshape(BLOCK_N, 2))
        sums = silu_times(gate, up)
    if HAS_RESIDUAL:
        sums += tl.load(residual_ptr + row * N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, sums.to(dtype), mask=inside)


@triton.jit
def _rows(
    weight, weight_at, weight_inside, lane, n, inside, out_ptr, x_ptr, bias, norm_ptr, residual_ptr, eps, x_stride,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The first ROWS rows of the output; `weight` is the first tile."""
    x_at = x_ptr + lane
    total_0 = tl.zeros([weight.shape[0], BLOCK_K // 8], tl.float32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    squares_0 = tl.zeros([1, BLOCK_K // 8], tl.float32)
    squares_1, squares_2, squares_3 = squares_0, squares_0, squares_0
    for k in range(0, K, BLOCK_K):
        now = weight.to(tl.float32)
        weight = _weights(weight_at, k + BLOCK_K, lane, weight_inside, K, BLOCK_K)
        gain = 1.0
        if HAS_NORM:
            gain = tl.load(norm_ptr + k + lane, mask=k + lane < K, other=0.0).to(tl.float32)
        total_0, squares_0 = _add(total_0, squares_0, now, x_at, lane, k, gain, K, BLOCK_K, HAS_NORM)
        if ROWS > 1:
            total_1, squares_1 = _add(total_1, squares_1, now, x_at + x_stride, lane, k, gain, K, BLOCK_K, HAS_NORM)
        if ROWS > 2:
            total_2, squares_2 = _add(total_2, squares_2, now, x_at + 2 * x_stride, lane, k, gain, K, BLOCK_K, HAS_NORM)
        if ROWS > 3:
            total_3, squares_3 = _add(total_3, squares_3, now, x_at + 3 * x_stride, lane, k, gain, K, BLOCK_K, HAS_NORM)
    _finish(
        total_0, squares_0, 0, n, inside, out_ptr, bias, residual_ptr, eps, N, K, BLOCK_N, HAS_NORM, HAS_RESIDUAL, GATED
    )
    if ROWS > 1:
        _finish(
            total_1,
            squares_1,
            1,
            n,
            inside,
            out_ptr,
            bias,
            residual_ptr,
            eps,
            N,
            K,
            BLOCK_N,
            HAS_NORM,
            HAS_RESIDUAL,
            GATED,
        )
    if ROWS > 2:
        _finish(
            total_2,
            squares_2,
            2,
            n,
            inside,
            out_ptr,
            bias,
            residual_ptr,
            eps,
            N,
            K,
            BLOCK_N,
            HAS_NORM,
            HAS_RESIDUAL,
            GATED,
        )
    if ROWS > 3:
        _finish(
            total_3,
            squares_3,
            3,
            n,
            inside,
            out_ptr,
            bias,
            residual_ptr,
            eps,
            N,
            K,
            BLOCK_N,
            HAS_NORM,
            HAS_RESIDUAL,
            GATED,
        )


@triton.jit
def gemv_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    live_ptr,
    eps,
    x_stride,
    ROWS: tl.constexpr,
    N: tl.constexpr,  # of the output
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    inside = n < N
    lane = tl.arange(0, BLOCK_K)[None, :]
    if GATED:  # gate and up rows in turn
        both = tl.arange(0, 2 * BLOCK_N)
        weight_row, weight_inside = first + both // 2 + both % 2 * N, first + both // 2 < N
    else:
        weight_row, weight_inside = n, inside
    weight_at = weight_ptr + weight_row.to(tl.int64)[:, None] * K + lane
    weight = _weights(weight_at, 0, lane, weight_inside[:, None], K, BLOCK_K)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + weight_row, mask=weight_inside, other=0.0).to(tl.float32)
    else:
        bias = 0.0
    live = ROWS
    if HAS_LIVE:  # it came with the step's metadata: no kernel writes it either
        live = tl.load(live_ptr)
    if PDL:
        wait()
    if live > 1:
        _rows(
            weight, weight_at, weight_inside[:, None], lane, n, inside, out_ptr, x_ptr, bias, norm_ptr, residual_ptr, eps, x_stride,
            ROWS, N, K, BLOCK_N, BLOCK_K, HAS_NORM, HAS_RESIDUAL, GATED,
        )  # fmt: skip
    else:
        _rows(
            weight, weight_at, weight_inside[:, None], lane, n, inside, out_ptr, x_ptr, bias, norm_ptr, residual_ptr, eps, x_stride,
            1, N, K, BLOCK_N, BLOCK_K, HAS_NORM, HAS_RESIDUAL, GATED,
        )  # fmt: skip
        for row in tl.static_range(1, ROWS):
            tl.store(out_ptr + row * N + n, tl.zeros([BLOCK_N], out_ptr.dtype.element_ty), mask=inside)


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: GemvTile,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    query_start: Tensor | None = None,
) -> Tensor:
    """x [T, K] (rows dense, T at most 4), weight [N, K] contiguous, bias [N] -> [T, N] in x's dtype.

    norm [K]: of x, RMS-normalised with it and eps. gated: silu(first half) * second half of the result, [T, N / 2].
    residual [T, N], contiguous: added to the result. query_start [S + 1]: where its last entry is 1, only the first row
    is computed and the others, padding, are 0.
    """
    rows, (out_size, size) = len(x), weight.shape
    if gated:
        out_size //= 2
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    gemv_kernel[(-(-out_size // tile.block_n),)](
        out,
        x,
        weight,
        bias if bias is not None else weight,
        norm if norm is not None else weight,
        residual if residual is not None else out,
        query_start[-1:] if query_start is not None else out,
        eps,
        x.stride(0),
        ROWS=rows,
        N=out_size,
        K=size,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_LIVE=query_start is not None and rows > 1,
        GATED=gated,
        num_warps=tile.num_warps,
        **dependent(x.device),
    )
    return out
