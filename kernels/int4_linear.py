"""Triton: x @ weight.T with a weight of 4-bit codes that lie as the matrix unit takes them (`reference.fragments`).

A thread loads the very codes of its operand, so a weight goes from memory through registers to the matrix unit and waits for no
other thread: it is widened by packed arithmetic, gets the scale and shift of its group in one multiply-add, and is rounded as
`dequantize` rounds it. Whole rows with one scale and no shift are multiplied as codes, and scaled at the end. The weight is
the left operand, and its columns may be split (`kernels.split_columns`). `dequantize` writes such a weight out, for products of
more rows. Knows sizes and codes; which way suits which is data in `kernels/quant_tiles.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.launch import dependent, wait
from kernels.skinny_tiles import Tile
from kernels.split_columns import added_up, is_last, room_for_parts
from kernels.widen import nibbles, scaled, settled

ROWS = tl.constexpr(reference.FRAGMENT_ROWS)  # of the weight that a block holds
MAX_BLOCK_T = 64  # of float32, which takes twice the room; else the tile says
DEQUANTIZE_BLOCKS = 4  # blocks of columns to a program that writes the weight out


@triton.jit
def _weight(codes, scale, shift, DTYPE: tl.constexpr, WHOLE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """Blocks below each other, uint8 [threads, bytes], scale and shift of their group, [threads, 2] -> the weight [rows, WIDTH].

    The first of a pair is of the row of a thread's low elements, the second of that 8 rows on.
    """
    low, high = nibbles(codes, DTYPE)
    if WHOLE:
        low_scale, high_scale = tl.split(scale)
        low_shift, high_shift = tl.split(shift)
        low, high = scaled(low, low_scale, low_shift, HAS_SHIFT), scaled(high, high_scale, high_shift, HAS_SHIFT)
    threads: tl.constexpr = codes.shape[0]
    steps: tl.constexpr = codes.shape[1] // 4
    # Threads are 8 rows of 4 by warps of 16 rows; elements are steps of 16 columns, halves of 8, neighbours; the last are rows 8 apart.
    parts = tl.join(low, high).reshape(threads // 32, 8, 4, steps, 2, 2, 2)
    return parts.permute(0, 6, 1, 3, 4, 2, 5).reshape(threads // 2, steps * 16)


@triton.jit(do_not_specialize=["num_rows"])  # 2 and 8 rows, 64 and 256, share a kernel
def int4_linear_kernel(
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
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_T)  # those that read the same weights run side by side
    tile = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    t = tl.program_id(0) % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = (t < num_rows)[None, :]
    column = tl.arange(0, WIDTH)
    blocks: tl.constexpr = (K + WIDTH - 1) // WIDTH
    span: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    begin = split * span
    # Two threads to each row of a tile; blocks past the last row of the weight are those of the last again: nothing of them is stored.
    thread = tl.arange(0, 2 * BLOCK_N)
    row_block = tl.minimum(tile * (BLOCK_N // ROWS) + thread // (2 * ROWS), (N + ROWS - 1) // ROWS - 1).to(tl.int64)
    at = thread % (2 * ROWS)
    codes_at = codes_ptr + (row_block * blocks * (ROWS * WIDTH // 2) + at * (WIDTH // 4))[:, None] + tl.arange(0, WIDTH // 4)[None, :]
    pair_at = (row_block * GROUPS * ROWS + at // 4 * 2)[:, None] + tl.arange(0, 2)[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + column[:, None]
    if PDL:
        wait()
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    scale = tl.zeros([2 * BLOCK_N, 2], scale_ptr.dtype.element_ty)
    shift = scale
    for k in range(begin, tl.maximum(begin, tl.minimum(begin + span, K)), BLOCK_K):
        for part in tl.static_range(BLOCK_K // WIDTH):
            start = k + part * WIDTH
            in_x = in_t
            if K % BLOCK_K != 0:
                in_x = in_x & (column < K - start)[:, None]
                start = tl.minimum(start, (blocks - 1) * WIDTH)
            codes = tl.load(codes_at + start * (ROWS // 2), eviction_policy="evict_first")
            x = tl.load(x_at + (k + part * WIDTH), mask=in_x, other=0.0)
            if WHOLE and (part == 0 or GROUP % BLOCK_K != 0):  # else the step lies in one group
                scale = tl.load(scale_ptr + pair_at + start // GROUP * ROWS)
                shift = scale
                if HAS_SHIFT:
                    shift = tl.load(shift_ptr + pair_at + start // GROUP * ROWS)
            weight = _weight(codes, scale, shift, x.dtype, WHOLE, HAS_SHIFT)
            total = tl.dot(weight, x, total, input_precision=PRECISION)
        total = settled(total)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    if not WHOLE:
        total *= tl.load(scale_ptr + n // 16 * 16 + n % 8 * 2 + n % 16 // 8, mask=in_n, other=0.0).to(tl.float32)[:, None]
    if SPLIT_K > 1:
        part_at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last(total, partial_ptr, counter_ptr, tl.program_id(0), split, part_at, SPLIT_K, BLOCK_N, BLOCK_T):
            return
        total = added_up(partial_ptr, counter_ptr, tl.program_id(0), part_at, SPLIT_K, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_t)


def int4_linear(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor | None, group: int, out_size: int, tile: Tile
) -> Tensor:
    """x [T, K] (rows dense), the weight as in `kernels.ops`, all contiguous -> [T, out_size] in x's dtype.

    A tile is of 64 rows of the weight or a multiple, and as many columns a step as a block has, or a multiple.
    """
    rows, size = x.shape
    width = 4 * codes.shape[3]
    if tile.block_n % ROWS.value or tile.block_k % width:
        raise ValueError(f"a tile of {tile.block_n} x {tile.block_k} is not made of blocks of {ROWS.value} x {width}")
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    most = tile.block_t if x.element_size() == 2 else MAX_BLOCK_T
    block_t = min(most, max(16, triton.next_power_of_2(rows)))
    programs = triton.cdiv(out_size, tile.block_n) * triton.cdiv(rows, block_t)
    partial, counters = room_for_parts(tile, programs, block_t, out)
    int4_linear_kernel[programs, tile.split_k](
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
        GROUPS=scale.shape[1],
        WIDTH=width,
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        WHOLE=shift is not None or scale.shape[1] > 1,
        HAS_SHIFT=shift is not None,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out


@triton.jit
def int4_dequantize_kernel(
    out_ptr,
    codes_ptr,
    scale_ptr,
    shift_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    blocks: tl.constexpr = (K + WIDTH - 1) // WIDTH
    row_block = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, 2 * ROWS)
    n = row_block * ROWS + tl.arange(0, ROWS)
    codes_at = codes_ptr + row_block * blocks * (ROWS * WIDTH // 2) + at[:, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
    pair_at = row_block * GROUPS * ROWS + (at // 4 * 2)[:, None] + tl.arange(0, 2)[None, :]
    for part in tl.static_range(BLOCKS):
        block = tl.program_id(1) * BLOCKS + part
        column = block * WIDTH + tl.arange(0, WIDTH)
        start = tl.minimum(block, blocks - 1) * WIDTH
        codes = tl.load(codes_at + start * (ROWS // 2))
        scale = tl.load(scale_ptr + pair_at + start // GROUP * ROWS)
        shift = scale
        if HAS_SHIFT:
            shift = tl.load(shift_ptr + pair_at + start // GROUP * ROWS)
        weight = _weight(codes, scale, shift, out_ptr.dtype.element_ty, True, HAS_SHIFT)
        tl.store(out_ptr + n[:, None] * K + column[None, :], weight, mask=(n < N)[:, None] & (column < K)[None, :])


def int4_dequantize(
    codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, out_size: int, size: int, dtype: torch.dtype
) -> Tensor:
    """The weight as in `kernels.ops`, all contiguous -> [out_size, size] in dtype, rounded once."""
    row_blocks, blocks, _, run = codes.shape
    out = torch.empty(out_size, size, dtype=dtype, device=codes.device)
    int4_dequantize_kernel[row_blocks, triton.cdiv(blocks, DEQUANTIZE_BLOCKS)](
        out,
        codes,
        scale,
        scale if shift is None else shift,
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=scale.shape[1],
        WIDTH=4 * run,
        BLOCKS=DEQUANTIZE_BLOCKS,
        HAS_SHIFT=shift is not None,
        num_warps=4,
    )
    return out
