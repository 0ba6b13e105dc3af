"""Triton: x @ weight.T by integers: x int8 with a scale for every 128 columns, the weight int8 of `reference.fragments` with one a row.

Integers are multiplied and added up exactly over 128 columns and meet the scale of x in float32, that of the weight at the end. The
matrix unit takes twice as many integers as bfloat16, and a weight becomes its operand by two instructions for eight codes. Knows sizes
and codes; which products go this way is data in `kernels/quant_tiles.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fragment_linear import SIZE, THREADS
from kernels.launch import dependent, wait
from kernels.quantize_rows import code_rows
from kernels.reference import CODED_GROUP
from kernels.skinny_tiles import Tile
from kernels.split_columns import added_up, is_last, room_for_parts
from kernels.widen import bytes_by_row

STEP = tl.constexpr(CODED_GROUP)  # columns of a scale of x
PART = 64  # rows of x that are multiplied at a time: sums of the next are on their way while these are added up


@triton.jit
def _half(codes_at):
    """Half of the codes of blocks below each other, 32 columns at [threads, 16] -> int8 [rows, 32] in the order of `reference.coded_rows`."""
    threads: tl.constexpr = codes_at.shape[0]
    codes = tl.load(codes_at, eviction_policy="evict_first")
    # Threads are 8 rows of 4 by warps of 16 rows; elements are halves of 16 columns, rows 8 apart, neighbours.
    parts = bytes_by_row(codes).reshape(threads // 32, 8, 4, 2, 2, 4)
    return parts.permute(0, 4, 1, 3, 2, 5).reshape(threads // 2, 32)


@triton.jit
def _beside(left, right):
    """Two [rows, columns] beside each other."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def _added(total, weight, x_at, x_scale_at):
    """A step's product with x at [128, t], scales of it at [t], added to float32 [n, t]."""
    sums = tl.dot(weight, tl.load(x_at), out_dtype=tl.int32)
    return total + sums.to(tl.float32) * tl.load(x_scale_at)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def coded_linear_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    num_rows,
    filled_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PARTS: tl.constexpr,  # of the rows of x: one or two
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_T)  # those that read the same weights run side by side
    tile = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    steps: tl.constexpr = (K + STEP - 1) // STEP
    share: tl.constexpr = (steps + SPLIT_K - 1) // SPLIT_K
    PART: tl.constexpr = BLOCK_T // PARTS
    # Two threads to each row of a tile; blocks past the last row of the weight are those of the last again: nothing of them is stored.
    thread = tl.arange(0, 2 * BLOCK_N)
    row_block = tl.minimum(tile * (BLOCK_N // SIZE) + thread // THREADS, (N + SIZE - 1) // SIZE - 1).to(tl.int64)
    codes_at = codes_ptr + (row_block * blocks * (SIZE * SIZE) + thread % THREADS * 16)[:, None] + tl.arange(0, 16)[None, :]
    t = tl.program_id(0) % row_blocks * BLOCK_T + tl.arange(0, PART)
    x_at = x_ptr + t.to(tl.int64)[None, :] * (steps * STEP) + tl.arange(0, STEP)[:, None]
    if PDL:
        wait()
    total = tl.zeros([BLOCK_N, PART], tl.float32)
    second = total
    # Said to the loop, the stages hold for scales too, which no product takes.
    for step in tl.range(split * share, tl.minimum((split + 1) * share, steps), num_stages=STAGES):
        left = codes_at + step * (STEP // SIZE) * (SIZE * SIZE)
        right = codes_at + tl.minimum(step * (STEP // SIZE) + 1, blocks - 1) * (SIZE * SIZE)  # past the last x is zeros
        weight = _beside(_beside(_half(left), _half(left + THREADS * 16)), _beside(_half(right), _half(right + THREADS * 16)))
        part_at, scale_at = x_at + step * STEP, x_scale_ptr + step * filled_rows + t
        total = _added(total, weight, part_at, scale_at)
        if PARTS == 2:
            second = _added(second, weight, part_at + PART * (steps * STEP), scale_at + PART)
    if PARTS == 2:
        total = _beside(total, second)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    total *= tl.load(scale_ptr + n // 16 * 16 + n % 8 * 2 + n % 16 // 8, mask=in_n, other=0.0).to(tl.float32)[:, None]
    if SPLIT_K > 1:
        sum_at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last(total, partial_ptr, counter_ptr, tl.program_id(0), split, sum_at, SPLIT_K, BLOCK_N, BLOCK_T):
            return
        total = added_up(partial_ptr, counter_ptr, tl.program_id(0), sum_at, SPLIT_K, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    row = tl.program_id(0) % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    out_at = out_ptr + row.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & (row < num_rows)[None, :])


def coded_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_size: int, tile: Tile) -> Tensor:
    """x [T, K] (rows dense), codes int8 and one scale a row as in `kernels.ops`, all contiguous -> [T, out_size] in x's dtype.

    A tile has a multiple of 64 as rows of the weight, up to 128 rows of x and 128 columns to a step.
    """
    rows, size = x.shape
    if tile.block_n % SIZE.value or tile.block_k != STEP.value or tile.block_t > 2 * PART:
        raise ValueError(f"{tile} is not made of blocks of {SIZE.value} x {STEP.value} for up to {2 * PART} rows")
    block_t = min(tile.block_t, max(16, triton.next_power_of_2(rows)))
    x_codes, x_scale = code_rows(x, block_t)
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(out_size, tile.block_n) * triton.cdiv(rows, block_t)
    partial, counters = room_for_parts(tile, programs, block_t, out)
    coded_linear_kernel[programs, tile.split_k](
        out,
        partial,
        counters,
        x_codes,
        x_scale,
        codes,
        scale,
        scale if bias is None else bias,
        rows,
        x_scale.shape[1],
        N=out_size,
        K=size,
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        SPLIT_K=tile.split_k,
        PARTS=max(1, block_t // PART),
        STAGES=tile.num_stages,
        HAS_BIAS=bias is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out
