"""Triton: x @ weight.T with the weight as codes and scales, read once as it is stored and widened in registers.

For codes of 8 bits. The weight is the left operand, as in `kernels.skinny_linear`, and its columns may be split the same way.
Codes are exact in the type of x: where a row has one scale and no shift the matrix unit multiplies codes, and scales join its
float32 sums at the end. Integers in groups become a weight in the type of x first, rounded as `dequantize` rounds it (WHOLE):
one packed multiply-add for two codes, where sums by group would cost two for each row of x. 8-bit floats in groups keep their
scales for the sums: they take long enough to convert. Knows sizes and codes; which way suits which is data in
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
from kernels.widen import settled, wide_codes

MAX_BLOCK_T = 64  # of float32, which takes twice the room; else the tile says


@triton.jit(do_not_specialize=["num_rows"])  # 2 and 8 rows, 64 and 256, share a kernel
def quant_linear_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    codes_ptr,
    scale_ptr,
    shift_ptr,
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
    WHOLE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
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
    scale_at = n.to(tl.int64) * GROUPS
    if PDL:
        wait()
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    scale, shift = scale_ptr, shift_ptr
    if WHOLE or GROUPS > 1:
        scale = tl.load(scale_ptr + scale_at + begin // GROUP, mask=in_n & (begin < K), other=0.0)
        shift = scale
        if HAS_SHIFT:
            shift = tl.load(shift_ptr + scale_at + begin // GROUP, mask=in_n & (begin < K), other=0.0)
    # The end is no less than the begin: an unrolled loop of fewer than no turns takes one.
    for k in tl.range(begin, tl.maximum(begin, tl.minimum(begin + span, K)), BLOCK_K, loop_unroll_factor=UNROLL):
        in_w = in_n[:, None]
        in_x = in_t[None, :]
        if K % BLOCK_K != 0:
            in_w = in_w & (column < K - k)[None, :]
            in_x = in_x & (column < K - k)[:, None]
        codes = tl.load(codes_at + k, mask=in_w, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + k, mask=in_x, other=0.0)
        if GROUPS > 1:  # those of the next step: they come while this one's are multiplied
            ahead = k + BLOCK_K
            next_scale = tl.load(scale_ptr + scale_at + ahead // GROUP, mask=in_n & (ahead < K), other=0.0)
            next_shift = next_scale
            if HAS_SHIFT:
                next_shift = tl.load(shift_ptr + scale_at + ahead // GROUP, mask=in_n & (ahead < K), other=0.0)
        wide = wide_codes(codes, scale, shift, x.dtype, WHOLE, HAS_SHIFT)
        if WHOLE or GROUPS == 1:
            total = settled(tl.dot(wide, x, total, input_precision=PRECISION))
        else:
            total += tl.dot(wide, x, input_precision=PRECISION) * scale.to(tl.float32)[:, None]
        if GROUPS > 1:
            scale, shift = next_scale, next_shift
    if not WHOLE and GROUPS == 1:
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


def quant_linear(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor | None, group: int, tile: Tile
) -> Tensor:
    """x [T, K] (rows dense), the weight as in `kernels.ops`, all contiguous -> [T, N] in x's dtype.

    The columns of a step of `tile` divide `group` where a row has several.
    """
    rows, size = x.shape
    out_size, groups = scale.shape
    if groups > 1 and group % tile.block_k:
        raise ValueError(f"a step of {tile.block_k} columns reaches over groups of {group}: take one that divides them")
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    tiles = -(-out_size // tile.block_n)
    most = tile.block_t if x.element_size() == 2 else MAX_BLOCK_T
    block_t = min(most, max(16, triton.next_power_of_2(rows)))
    programs = tiles * -(-rows // block_t)
    partial, counters = room_for_parts(tile, programs, block_t, out)
    quant_linear_kernel[programs, tile.split_k](
        out,
        partial,
        counters,
        x,
        codes,
        scale,
        scale if shift is None else shift,
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
        WHOLE=shift is not None or (groups > 1 and codes.dtype != torch.float8_e4m3fn),
        HAS_SHIFT=shift is not None,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out
