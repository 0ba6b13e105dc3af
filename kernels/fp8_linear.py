"""Triton: x @ weight.T with the weight as 8-bit floats and scales, read once as it is stored and widened in registers.

The weight is the left operand, as in `kernels.skinny_linear`, and its columns may be split the same way. Codes are exact in the
type of x: the matrix unit multiplies them, and scales join its float32 sums, at the end or group by group.
`fp8_dequantize` writes such a weight out, for products of more rows. Knows sizes and codes; which way suits which is data in
`kernels/quant_tiles.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, wait
from kernels.skinny_tiles import Tile
from kernels.split_columns import added_up, is_last, room_for_parts
from kernels.widen import settled

MAX_BLOCK_T = 64  # of float32, which takes twice the room; else the tile says
BLOCK, BLOCK_K = 4096, 256  # elements of a block that is written out, and its most columns, which lie in one group


@triton.jit(do_not_specialize=["num_rows"])  # 2 and 8 rows, 64 and 256, share a kernel
def fp8_linear_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    num_rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_T)  # those that read the same weights run side by side
    tile = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(0) % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    in_n = n < N
    in_t = t < num_rows
    span: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    column = tl.arange(0, BLOCK_K)
    begin = split * span
    codes_at = codes_ptr + n.to(tl.int64)[:, None] * K + column[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + column[:, None]
    scale_at = scale_ptr + n.to(tl.int64) * GROUPS
    if PDL:
        wait()
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if GROUPS > 1:
        scale = tl.load(scale_at + begin // GROUP, mask=in_n & (begin < K), other=0.0)
    # The end is no less than the begin: an unrolled loop of fewer than no turns takes one.
    for k in tl.range(begin, tl.maximum(begin, tl.minimum(begin + span, K)), BLOCK_K, loop_unroll_factor=UNROLL):
        in_w = in_n[:, None]
        in_x = in_t[None, :]
        if K % BLOCK_K != 0:
            in_w = in_w & (column < K - k)[None, :]
            in_x = in_x & (column < K - k)[:, None]
        codes = tl.load(codes_at + k, mask=in_w, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + k, mask=in_x, other=0.0)
        wide = codes.to(tl.float32).to(x.dtype)  # straight to bfloat16 it takes the slower converter
        if GROUPS == 1:
            total = settled(tl.dot(wide, x, total, input_precision=PRECISION))
        else:  # the scale of the next step comes while this one is multiplied
            ahead = k + BLOCK_K
            next_scale = tl.load(scale_at + ahead // GROUP, mask=in_n & (ahead < K), other=0.0)
            total += tl.dot(wide, x, input_precision=PRECISION) * scale.to(tl.float32)[:, None]
            scale = next_scale
    if GROUPS == 1:
        total *= tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    if SPLIT_K > 1:
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last(total, partial_ptr, counter_ptr, tl.program_id(0), split, at, SPLIT_K, BLOCK_N, BLOCK_T):
            return
        total = added_up(partial_ptr, counter_ptr, tl.program_id(0), at, SPLIT_K, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_t[None, :])


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group: int, tile: Tile) -> Tensor:
    """x [T, K] (rows dense), codes float8_e4m3fn [N, K] with scales [N, groups], all contiguous -> [T, N] in x's dtype.

    The columns of a step of `tile` divide `group` where a row has several.
    """
    rows, size = x.shape
    out_size, groups = scale.shape
    if groups > 1 and group % tile.block_k:
        raise ValueError(f"a step of {tile.block_k} columns reaches over groups of {group}: take one that divides them")
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    most = tile.block_t if x.element_size() == 2 else MAX_BLOCK_T
    block_t = min(most, max(16, triton.next_power_of_2(rows)))
    programs = triton.cdiv(out_size, tile.block_n) * triton.cdiv(rows, block_t)
    partial, counters = room_for_parts(tile, programs, block_t, out)
    fp8_linear_kernel[programs, tile.split_k](
        out,
        partial,
        counters,
        x,
        codes,
        scale,
        scale if bias is None else bias,
        rows,
        x.stride(0),
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=groups,
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        UNROLL=max(1, 128 // tile.block_k) if block_t <= MAX_BLOCK_T else 1,  # short steps of few rows share what a turn of the loop costs
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out


@triton.jit
def fp8_dequantize_kernel(
    out_ptr,
    codes_ptr,
    scale_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    n = n.to(tl.int64)
    begin = tl.program_id(1) * BLOCK_K
    column = begin + tl.arange(0, BLOCK_K)
    inside = in_n[:, None] & (column < K)[None, :]
    scale = tl.load(scale_ptr + n * GROUPS + begin // GROUP, mask=in_n, other=0.0).to(tl.float32)
    codes = tl.load(codes_ptr + n[:, None] * K + column[None, :], mask=inside, other=0.0)
    weight = codes.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + n[:, None] * K + column[None, :], weight.to(out_ptr.dtype.element_ty), mask=inside)


def fp8_dequantize(codes: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """codes float8_e4m3fn [N, K] with scales [N, groups], all contiguous -> [N, K] in dtype; as `reference.dequantize`, rounded once."""
    (out_size, size), groups = codes.shape, scale.shape[1]
    out = torch.empty(out_size, size, dtype=dtype, device=codes.device)
    block_k = BLOCK_K if groups == 1 else min(BLOCK_K, group & -group)
    block_n = BLOCK // block_k
    fp8_dequantize_kernel[triton.cdiv(out_size, block_n), triton.cdiv(size, block_k)](
        out, codes, scale, N=out_size, K=size, GROUP=group, GROUPS=groups, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4
    )  # fmt: skip
    return out
