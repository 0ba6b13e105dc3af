"""Triton: x @ weight.T for few rows of x, bound by reading the weight once.

The weight is the left operand of the tensor cores, so few rows pad to 16 columns instead of 64 rows. Where the
weight has too few rows to fill the device, its columns are split too: each program leaves a partial sum, and the last
to arrive at a tile adds them in order, so the result does not depend on timing. A gate is applied before the product is
stored. Knows no models; which shapes are better left to cuBLAS is data in `kernels/linear/tiles.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.silu_mul import silu_times
from pagegraph.kernels.linear.split_k import is_last_arriver, partial_buffers, reduce_partials
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.pdl import dependent, wait


@triton.jit(do_not_specialize=["num_rows"])
def skinny_gemm_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    x_stride,
    N: tl.constexpr,  # of the output
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:  # gate and up rows in turn
        n = n // 2 + n % 2 * N
        in_n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)) < 2 * N
    else:
        in_n = n < N
    t = tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_K)
    in_t = t < num_rows
    span: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    begin = split * span
    weight_at = weight_ptr + n.to(tl.int64)[:, None] * K + lane[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + lane[:, None]
    if PDL:
        wait()
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for k in range(begin, min(begin + span, K), BLOCK_K):
        if K % BLOCK_K == 0:
            weight = tl.load(weight_at + k, mask=in_n[:, None], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at + k, mask=in_t[None, :], other=0.0)
        else:
            inside = lane < K - k
            weight = tl.load(
                weight_at + k, mask=in_n[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first"
            )
            x = tl.load(x_at + k, mask=in_t[None, :] & inside[:, None], other=0.0)
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    if SPLIT_K > 1:
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + t[None, :]
        if not is_last_arriver(total, partial_ptr, counter_ptr, tile, split, at, SPLIT_K, BLOCK_N, BLOCK_T):
            return
        total = reduce_partials(partial_ptr, counter_ptr, tile, at, SPLIT_K, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    if GATED:
        # Rounded as a product of its own would be, then as `silu_mul` does.
        both = total.to(dtype).to(tl.float32).reshape(BLOCK_N // 2, 2, BLOCK_T).permute(0, 2, 1)
        gate, up = tl.split(both)
        column = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_at = out_ptr + t.to(tl.int64)[None, :] * N + column[:, None]
        tl.store(out_at, silu_times(gate, up).to(dtype), mask=(column < N)[:, None] & in_t[None, :])
    else:
        out_at = out_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out_at, total.to(dtype), mask=in_n[:, None] & in_t[None, :])


def skinny_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, gated: bool = False) -> Tensor:
    """x [T, K] (rows dense, T at most 64), weight [N, K] contiguous, bias [N] -> [T, N] in x's dtype.

    gated: silu(first half) * second half of the result, [T, N / 2].
    """
    rows, (out_size, size) = len(x), weight.shape
    out = torch.empty(rows, out_size // 2 if gated else out_size, dtype=x.dtype, device=x.device)
    tiles = -(-out_size // tile.block_n)
    block_t = max(16, triton.next_power_of_2(rows))
    partial, counters = partial_buffers(tile, tiles, block_t, out)
    skinny_gemm_kernel[tiles, tile.split_k](
        out,
        partial,
        counters,
        x,
        weight,
        bias if bias is not None else weight,
        rows,
        x.stride(0),
        N=out.shape[1],
        K=size,
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        HAS_BIAS=bias is not None,
        GATED=gated,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out
