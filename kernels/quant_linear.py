"""Triton: x @ weight.T with the weight as codes and scales, read once as it is stored and widened in registers.

The weight is the left operand, as in `kernels.skinny_linear`, and its columns may be split the same way. Codes are exact in
the type of x, so the matrix unit multiplies codes, and scales join its float32 sums: once a row where they are a row's, else
once a group. A shift is its group's sum of x, which the matrix unit adds up beside the product. What an instruction costs
decides these loops: at 4 bits an SM is to widen 38 codes a cycle, and can issue 3.4 instructions a code. Knows sizes and
codes; which way suits which is data in `kernels/quant_tiles.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, wait
from kernels.skinny_tiles import Tile
from kernels.split_columns import added_up, is_last, room_for_parts

NIBBLE_SPAN = tl.constexpr(32)  # of `reference.pack_nibbles`
MAX_BLOCK_T = 64
# Two bytes of two codes each: a code, 0 to 15, becomes the low bits of 128.0 in bfloat16, then 136 is taken off, which is exact.
NIBBLES = tl.constexpr("""{
.reg .b32 low, high, one, bias;
mov.b32 one, 0x3f803f80;
mov.b32 bias, 0xc308c308;
cvt.u32.u16 low, $2;
prmt.b32 low, low, 0, 0x4140;
shr.u32 high, low, 4;
lop3.b32 low, low, 0x000f000f, 0x43004300, 0xea;
lop3.b32 high, high, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, low, one, bias;
fma.rn.bf16x2 $1, high, one, bias;
}""")
# Two int8 codes: their low seven bits the same way, then 128 is taken off, 256 where the code is negative.
BYTES = tl.constexpr("""{
.reg .b32 low, bias, minus;
mov.b32 minus, 0xbf80bf80;
cvt.u32.u16 low, $1;
prmt.b32 low, low, 0, 0x4140;
lop3.b32 bias, low, 0x00800080, 0x43004300, 0xea;
lop3.b32 low, low, 0x007f007f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, bias, minus, low;
}""")
ASSEMBLES = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _nibbles(codes, DTYPE: tl.constexpr):
    """uint8 of two codes each -> the low and the high ones, -8 to 7, in DTYPE."""
    if ASSEMBLES and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(NIBBLES, "=r,=r,h", [codes], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    else:
        return ((codes & 15).to(tl.int8) - 8).to(DTYPE), ((codes >> 4).to(tl.int8) - 8).to(DTYPE)


@triton.jit
def _wide(codes, DTYPE: tl.constexpr):
    """int8 or e4m3 codes in DTYPE."""
    if ASSEMBLES and DTYPE == tl.bfloat16 and codes.dtype == tl.int8:
        return tl.inline_asm_elementwise(BYTES, "=r,h", [codes], tl.bfloat16, is_pure=True, pack=2)
    else:  # e4m3 to float32 and on: straight to bfloat16 it takes the slower converter
        return codes.to(tl.float32).to(DTYPE)


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
    INT4: tl.constexpr,
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
    # With two codes a byte, byte b of a step holds columns column[b] and column[b] + 16.
    PER_BYTE: tl.constexpr = 2 if INT4 else 1
    byte = tl.arange(0, BLOCK_K // PER_BYTE)
    column = byte // (NIBBLE_SPAN // 2) * NIBBLE_SPAN + byte % (NIBBLE_SPAN // 2) if INT4 else byte
    begin = split * span
    codes_at = codes_ptr + n.to(tl.int64)[:, None] * (K // PER_BYTE) + byte[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + column[:, None]
    scale_at = n.to(tl.int64) * GROUPS
    if PDL:
        wait()
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    ones = tl.full([BLOCK_N, BLOCK_K // PER_BYTE], 1.0, tl.float32).to(x_ptr.dtype.element_ty)
    if GROUPS > 1:
        scale = tl.load(scale_ptr + scale_at + begin // GROUP, mask=in_n & (begin < K), other=0.0)
        shift = scale
        if HAS_SHIFT:
            shift = tl.load(shift_ptr + scale_at + begin // GROUP, mask=in_n & (begin < K), other=0.0)
    for k in tl.range(begin, min(begin + span, K), BLOCK_K, loop_unroll_factor=UNROLL):
        in_w = in_n[:, None]
        in_x = in_t[None, :]
        if K % BLOCK_K != 0:
            in_w = in_w & (column < K - k)[None, :]
            in_x = in_x & (column < K - k)[:, None]
        codes = tl.load(codes_at + k // PER_BYTE, mask=in_w, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + k, mask=in_x, other=0.0)
        if GROUPS > 1:  # those of the next step: they come while this one's are multiplied
            ahead = k + BLOCK_K
            next_scale = tl.load(scale_ptr + scale_at + ahead // GROUP, mask=in_n & (ahead < K), other=0.0)
            next_shift = next_scale
            if HAS_SHIFT:
                next_shift = tl.load(shift_ptr + scale_at + ahead // GROUP, mask=in_n & (ahead < K), other=0.0)
        if INT4:
            x_high = tl.load(x_at + (k + NIBBLE_SPAN // 2), mask=in_x, other=0.0)
            low, high = _nibbles(codes, x.dtype)
            if GROUPS == 1:
                total = tl.dot(high, x_high, tl.dot(low, x, total, input_precision=PRECISION), input_precision=PRECISION)
            else:
                part = tl.dot(high, x_high, tl.dot(low, x, input_precision=PRECISION), input_precision=PRECISION)
        else:
            wide = _wide(codes, x.dtype)
            if GROUPS == 1:
                total = tl.dot(wide, x, total, input_precision=PRECISION)
            else:
                part = tl.dot(wide, x, input_precision=PRECISION)
        if HAS_SHIFT:  # the sum of x by the matrix unit too, which has time: all rows of it are alike
            summed = tl.dot(ones, x, sums, input_precision=PRECISION)
            if INT4:
                summed = tl.dot(ones, x_high, summed, input_precision=PRECISION)
        if GROUPS > 1:
            total += part * scale.to(tl.float32)[:, None]
            if HAS_SHIFT:
                total += summed * shift.to(tl.float32)[:, None]
            scale, shift = next_scale, next_shift
        elif HAS_SHIFT:
            sums = summed
    if GROUPS == 1:
        total *= tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
        if HAS_SHIFT:
            total += tl.load(shift_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None] * sums
    if SPLIT_K > 1:
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last(total, partial_ptr, counter_ptr, tile, split, at, SPLIT_K, BLOCK_N, BLOCK_T):
            return
        total = added_up(partial_ptr, counter_ptr, tile, at, SPLIT_K, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_t[None, :])


def quant_linear(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor | None, group: int, tile: Tile
) -> Tensor:
    """x [T, K] (rows dense), the weight as in `kernels.ops`, all contiguous -> [T, N] in x's dtype.

    `tile` splits columns for at most 64 rows, and its columns of a step divide `group` where a row has several.
    """
    rows, size = x.shape
    out_size, groups = scale.shape
    if groups > 1 and group % tile.block_k:
        raise ValueError(f"a step of {tile.block_k} columns reaches over groups of {group}: take one that divides them")
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    tiles = -(-out_size // tile.block_n)
    block_t = min(MAX_BLOCK_T, max(16, triton.next_power_of_2(rows)))
    partial, counters = room_for_parts(tile, tiles, block_t, out)
    quant_linear_kernel[tiles * -(-rows // block_t), tile.split_k](
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
        UNROLL=max(1, 128 // tile.block_k),  # short steps share what a turn of the loop costs
        INT4=codes.dtype == torch.uint8,
        HAS_SHIFT=shift is not None,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out
