"""Triton: x @ weight.T for one to four rows of x, with what stands around it: a norm, a residual, a gate.

Without tensor cores: each program multiplies a few rows of the weight by all of x and adds up at the end, so a product is one
pass over the weight with nothing to merge. A bucket of two rows that holds one costs no more than one. The first weights, of one
or of several tiles, are asked for before the kernel waits for those before it, the norm's weight with them.
The norm of x costs no pass of its own: its scale is one number a row, which is known when the product is; where others read the
normed rows too, each program leaves its share of them. Knows no models; which shapes are cut how is data in
`kernels/linear/tiles.py`.

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

from pagegraph.kernels.linear.rms_norm import scaled_rows
from pagegraph.kernels.linear.silu_mul import silu_times
from pagegraph.kernels.linear.tiles import GemvTile
from pagegraph.kernels.pdl import dependent, wait


@triton.jit
def _columns(at, k, lane, inside, K: tl.constexpr, STEP: tl.constexpr, POLICY: tl.constexpr):
    """Columns from k on, as many as `lane` has; zeros past the end, which is asked for up to STEP too far."""
    if K % STEP == 0:
        seen = inside & (k < K)
    else:
        seen = inside & (k + lane < K)
    return tl.load(at + k, mask=seen, other=0.0, eviction_policy=POLICY)


@triton.jit
def _tiles(at, k, lane, inside, K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, POLICY: tl.constexpr):
    """AHEAD tiles of columns from k on, all asked for at once."""
    tiles = ()
    for ahead in tl.static_range(AHEAD):
        tiles = tiles + (_columns(at, k + ahead * BLOCK_K, lane, inside, K, AHEAD * BLOCK_K, POLICY),)
    return tiles


@triton.jit
def _within_threads(products):
    """[N, BLOCK_K] -> [N, BLOCK_K / 8]: sums of the eight neighbours that a thread has loaded together."""
    return tl.sum(products.reshape(products.shape[0], products.shape[1] // 8, 8), 2)


@triton.jit
def _add(total, squares, weight, x, gain, HAS_NORM: tl.constexpr):
    """A tile's products with one row of x."""
    x = x.to(tl.float32)
    if HAS_NORM:
        squares += _within_threads(x * x)
        x = x * gain
    return total + _within_threads(weight * x), squares


@triton.jit
def _finish(
    total, mean, residual, at, inside, bias, eps,
    BLOCK_N: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Store one row of the output from its products; rounds where kernels of their own would. mean: of the squares of x."""
    dtype = at.dtype.element_ty
    sums = tl.sum(total, 1)
    if HAS_NORM:
        sums = sums * tl.rsqrt(mean + eps)
    sums = (sums + bias).to(dtype).to(tl.float32)
    if GATED:
        gate, up = tl.split(sums.reshape(BLOCK_N, 2))
        sums = silu_times(gate, up)
    if HAS_RESIDUAL:
        sums += residual.to(tl.float32)
    tl.store(at, sums.to(dtype), mask=inside)


@triton.jit
def _rows(
    weights, gains, weight_at, weight_inside, lane, n, inside, out_ptr, normed_ptr, x_ptr, bias, norm_ptr, residual_ptr, eps, x_stride,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The first ROWS rows of the output; `weights` and `gains` are the first AHEAD tiles.

    SHARE: columns of the normed rows that this program leaves, 0: nobody reads them.
    """
    STEP: tl.constexpr = AHEAD * BLOCK_K
    residuals = ()
    totals = ()
    squares = ()
    for row in tl.static_range(ROWS):
        if HAS_RESIDUAL:  # asked for long before it is added
            residuals = residuals + (tl.load(residual_ptr + row * N + n, mask=inside, other=0.0),)
        else:
            residuals = residuals + (0.0,)
        totals = totals + (tl.zeros([weights[0].shape[0], BLOCK_K // 8], tl.float32),)
        squares = squares + (tl.zeros([1, BLOCK_K // 8], tl.float32),)
    for k in range(0, K, STEP):
        next_weights = ()
        next_gains = ()
        for ahead in tl.static_range(AHEAD):
            now, gain = weights[ahead].to(tl.float32), gains[ahead]
            if K > STEP:
                at = k + STEP + ahead * BLOCK_K
                next_weights = next_weights + (_columns(weight_at, at, lane, weight_inside, K, STEP, "evict_first"),)
                if HAS_NORM:
                    next_gains = next_gains + (_columns(norm_ptr + lane, at, lane, lane >= 0, K, STEP, ""),)
                else:
                    next_gains = next_gains + (gain,)
            if HAS_NORM:
                gain = gain.to(tl.float32)
            next_totals = ()
            next_squares = ()
            for row in tl.static_range(ROWS):
                x = _columns(x_ptr + row * x_stride + lane, k + ahead * BLOCK_K, lane, lane >= 0, K, STEP, "")
                total, square = _add(totals[row], squares[row], now, x, gain, HAS_NORM)
                next_totals = next_totals + (total,)
                next_squares = next_squares + (square,)
            totals = next_totals
            squares = next_squares
        if K > STEP:
            weights = next_weights
            gains = next_gains
    for row in tl.static_range(ROWS):
        mean = 0.0
        if HAS_NORM:
            mean = tl.sum(tl.sum(squares[row], 1), 0) / K
        _finish(
            totals[row], mean, residuals[row], out_ptr + row * N + n, inside, bias, eps,
            BLOCK_N, HAS_NORM, HAS_RESIDUAL, GATED,
        )  # fmt: skip
        if SHARE > 0:
            column = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
            x = tl.load(x_ptr + row * x_stride + column, mask=column < K, other=0.0)
            gain = tl.load(norm_ptr + column, mask=column < K, other=0.0)
            tl.store(normed_ptr + row * K + column, scaled_rows(x, mean, eps, gain), mask=column < K)


@triton.jit
def gemv_kernel(
    out_ptr,
    normed_ptr,
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
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    GATED: tl.constexpr,
    SHARE: tl.constexpr,
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
    weights = _tiles(weight_at, 0, lane, weight_inside[:, None], K, BLOCK_K, AHEAD, "evict_first")
    gains = ()
    if HAS_NORM:
        gains = _tiles(norm_ptr + lane, 0, lane, lane >= 0, K, BLOCK_K, AHEAD, "")
    else:
        for _ in tl.static_range(AHEAD):
            gains = gains + (1.0,)
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
            weights, gains, weight_at, weight_inside[:, None], lane, n, inside, out_ptr, normed_ptr, x_ptr, bias, norm_ptr, residual_ptr, eps, x_stride,
            ROWS, N, K, BLOCK_N, BLOCK_K, AHEAD, HAS_NORM, HAS_RESIDUAL, GATED, SHARE,
        )  # fmt: skip
    else:
        _rows(
            weights, gains, weight_at, weight_inside[:, None], lane, n, inside, out_ptr, normed_ptr, x_ptr, bias, norm_ptr, residual_ptr, eps, x_stride,
            1, N, K, BLOCK_N, BLOCK_K, AHEAD, HAS_NORM, HAS_RESIDUAL, GATED, SHARE,
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
    normed: Tensor | None = None,
) -> Tensor:
    """x [T, K] (rows dense, T at most 4), weight [N, K] contiguous, bias [N] -> [T, N] in x's dtype.

    norm [K]: of x, RMS-normalised with it and eps. gated: silu(first half) * second half of the result, [T, N / 2].
    residual [T, N], contiguous: added to the result. query_start [S + 1]: where its last entry is 1, only the first row
    is computed and the others, padding, are 0 or, of normed, not written. normed [T, K], contiguous: where the normed rows are left.
    """
    rows, (out_size, size) = len(x), weight.shape
    if gated:
        out_size //= 2
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    programs = -(-out_size // tile.block_n)
    gemv_kernel[(programs,)](
        out,
        normed if normed is not None else out,
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
        AHEAD=tile.ahead,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_LIVE=query_start is not None and rows > 1,
        GATED=gated,
        SHARE=triton.next_power_of_2(-(-size // programs)) if normed is not None else 0,
        num_warps=tile.num_warps,
        **dependent(x.device),
    )
    return out
