"""Triton: x @ weight.T with 8 bits on both sides: rows of x quantised dynamically (W8A8, W4A8), and a weight of `reference.repack`.

Tensor cores take twice as many 8-bit values as bfloat16 ones, and add up 128 columns at a time:
- int8: rows of int8 with a scale for every 128 columns, the weight with one a row. Sums are exact, meet the scale of x in float32, that of the weight at the end.
- int4: rows of e4m3 with a scale each, the weight in groups of a multiple of 128, or of all columns. A value plus 8, in the low bits of a byte, is e4m3 as
  it stands, in units of 2**-9; sums meet the scale of their group in float32. Shifts, and the 8 too much, multiply whole groups of x: sums of its columns.

Knows sizes and layouts; which linears go this way is data in `kernels/quant/tiles.py`.

On a GPU activations stay in bfloat16 up to 64 rows. From 65 rows on int8 weights with one scale a row meet
activations quantised to int8, int4 weights in groups of multiples of 128 activations in e4m3 with one scale a token,
also where a checkpoint declares no 8-bit activations: there is no bfloat16 weight to fall back to, and dequantised
weights were slower than bfloat16 there. int8 takes a scale for every 128 columns of a token: with one scale a token
the KL against bfloat16 is 0.079 (SmolLM2, 278 positions), because a few activations are large; with 128 columns
0.015, less than e4m3's 0.022. Sums are exact over 128 columns and are added up in float32. int8x2 loses less
(0.008) but are as many operations as bfloat16. int4 takes e4m3 because a 4-bit value in the low bits of a byte is
e4m3 as it stands and sums come as floats, so that a group costs one multiply-add a sum. Groups of 32 and 64 keep
bfloat16 activations: their sums would be as many operations as the GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.split_k import is_last_arriver, partial_buffers, reduce_partials
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.quant.activations import Norm, e4m3_rows, int8_rows, width
from pagegraph.kernels.quant.dequant import bytes_by_row, nibbles_by_row
from pagegraph.kernels.quant.gemm_16bit import SIZE, THREADS, scale_place
from pagegraph.kernels.quant.reference import ACTIVATION_GROUP
from pagegraph.kernels.quant.tiles import has_gemm_8bit
from pagegraph.kernels.quant.weight import QuantWeight

STEP = tl.constexpr(ACTIVATION_GROUP)  # columns of a scale of x
ZERO_STEPS = tl.constexpr(32)  # steps whose zeros are one product
BIAS = tl.constexpr(8)  # that a value of 4 bits is held with
UNIT = tl.constexpr(2.0**-9)  # what the lowest bit of an e4m3 is worth while its upper four are 0
ROWS_AT_ONCE = 64  # of x: sums of the next are on their way while these are added up


@triton.jit
def _half(qweight_at):
    """Half of the values of blocks below each other, 32 columns at [threads, 16] -> int8 [rows, 32] in the order of `reference.int8_rows`."""
    threads: tl.constexpr = qweight_at.shape[0]
    qweight = tl.load(qweight_at, eviction_policy="evict_first")
    # Threads are 8 rows of 4 by warps of 16 rows; elements are halves of 16 columns, rows 8 apart, neighbours.
    parts = bytes_by_row(qweight).reshape(threads // 32, 8, 4, 2, 2, 4)
    return parts.permute(0, 4, 1, 3, 2, 5).reshape(threads // 2, 32)


@triton.jit
def _block(qweight_at):
    """Values of 4 bits of blocks below each other at [threads, 16] -> e4m3 [rows, 64] in the order of `reference.int8_rows`."""
    threads: tl.constexpr = qweight_at.shape[0]
    upper, lower = nibbles_by_row(tl.load(qweight_at, eviction_policy="evict_first"))
    parts = tl.join(upper, lower).reshape(
        threads // 32, 8, 4, 4, 4, 2
    )  # elements are steps of 16 columns, neighbours, rows 8 apart
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(threads // 2, SIZE)


@triton.jit
def _of_rows(pairs_ptr, pair_at):
    """Scales of rows as `reference.repack_scales` lays them, pairs [rows / 2] -> float32 [rows, 1] in the order of the rows."""
    pairs: tl.constexpr = pair_at.shape[0]
    if (
        pairs_ptr.dtype.element_ty.primitive_bitwidth == 16
    ):  # both of a pair at once: less than four bytes cannot be fetched ahead
        both = tl.load(pairs_ptr.to(tl.pointer_type(tl.uint32)) + pair_at)
        upper = (both & 0xFFFF).to(tl.uint16).to(pairs_ptr.dtype.element_ty, bitcast=True)
        lower = (both >> 16).to(tl.uint16).to(pairs_ptr.dtype.element_ty, bitcast=True)
    else:
        upper, lower = tl.load(pairs_ptr + pair_at * 2), tl.load(pairs_ptr + pair_at * 2 + 1)
    return (
        tl.join(upper.to(tl.float32), lower.to(tl.float32))
        .reshape(pairs // 8, 8, 2)
        .permute(0, 2, 1)
        .reshape(2 * pairs)[:, None]
    )


@triton.jit
def _add_zeros(
    total, scale_ptr, zero_ptr, sum_ptr, n, first_step, end, t, filled_rows, N: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr
):  # fmt: skip
    """float32 [n, t] with what zeros, and the 8 too much of values, add over the steps before `end`: times sums of columns of x."""
    row_at = tl.minimum(n // SIZE, (N + SIZE - 1) // SIZE - 1) * (GROUPS * SIZE) + scale_place(n % SIZE, False)
    for start in tl.range(first_step, end, ZERO_STEPS, num_stages=1):
        step = start + tl.arange(0, ZERO_STEPS)
        at = row_at[:, None] + (tl.minimum(step, end - 1) * STEP // GROUP * SIZE)[None, :]
        zero = tl.load(scale_ptr + at).to(tl.float32) * -BIAS
        if HAS_ZERO:
            zero += tl.load(zero_ptr + at).to(tl.float32)
        x_sum = tl.load(sum_ptr + step[:, None] * filled_rows + t[None, :], mask=(step < end)[:, None], other=0.0)
        total = tl.dot(zero * UNIT, x_sum, total, input_precision="tf32")
    return total


@triton.jit
def _beside(left, right):
    """Two [rows, columns] beside each other."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def _added(total, weight, scale, x_at, x_scale_at, INT4: tl.constexpr):
    """A step's product with x at [128, t] added to float32 [n, t]: times the weight's scale [n, 1], or that of x at [t]."""
    if INT4:
        return total + tl.dot(weight, tl.load(x_at)) * scale
    else:
        sums = tl.dot(weight, tl.load(x_at), out_dtype=tl.int32)
        return total + sums.to(tl.float32) * tl.load(x_scale_at)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def gemm_8bit_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    num_rows,
    filled_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PARTS: tl.constexpr,  # of the rows of x: one or two
    STAGES: tl.constexpr,
    INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
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
    BYTES: tl.constexpr = SIZE * SIZE // 2 if INT4 else SIZE * SIZE  # of a block
    last: tl.constexpr = (N + SIZE - 1) // SIZE - 1
    # Two threads to each row of a tile; blocks past the last row of the weight are those of the last again: nothing of them is stored.
    thread = tl.arange(0, 2 * BLOCK_N)
    row_block = tl.minimum(tile * (BLOCK_N // SIZE) + thread // THREADS, last).to(tl.int64)
    qweight_at = qweight_ptr + (row_block * blocks * BYTES + thread % THREADS * 16)[:, None] + tl.arange(0, 16)[None, :]
    t = tl.program_id(0) % row_blocks * BLOCK_T + tl.arange(0, PART)
    x_at = x_ptr + t.to(tl.int64)[None, :] * (steps * STEP) + tl.arange(0, STEP)[:, None]
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    pair = tl.arange(0, BLOCK_N // 2)
    pair_at = tl.minimum(tile * (BLOCK_N // SIZE) + pair // 32, last) * (groups * 32) + pair % 32
    if PDL:
        wait()
    total = tl.zeros([BLOCK_N, PART], tl.float32)
    second = total
    # num_stages on the loop and not the kernel alone: else loads that no product takes, the scales, are not fetched ahead.
    for step in tl.range(split * share, tl.minimum((split + 1) * share, steps), num_stages=STAGES):
        left = qweight_at + step * (STEP // SIZE) * BYTES
        right = qweight_at + tl.minimum(step * (STEP // SIZE) + 1, blocks - 1) * BYTES  # past the last x is zeros
        if INT4:
            weight = _beside(_block(left), _block(right))
            scale = _of_rows(scale_ptr, pair_at + step * STEP // GROUP * 32)
        else:
            weight = _beside(
                _beside(_half(left), _half(left + THREADS * 16)), _beside(_half(right), _half(right + THREADS * 16))
            )
            scale = 1.0
        part_at, scale_at = x_at + step * STEP, x_scale_ptr + step * filled_rows + t
        total = _added(total, weight, scale, part_at, scale_at, INT4)
        if PARTS == 2:
            second = _added(second, weight, scale, part_at + PART * (steps * STEP), scale_at + PART, INT4)
    if PARTS == 2:
        total = _beside(total, second)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    row = tl.program_id(0) % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    if INT4:
        end = tl.minimum((split + 1) * share, steps)
        total = _add_zeros(
            total, scale_ptr, zero_ptr, x_sum_ptr, n, split * share, end, row, filled_rows, N, GROUP, groups, HAS_ZERO
        )
        total *= tl.load(x_scale_ptr + row)[None, :] * (1 / UNIT)
    else:
        total *= tl.load(scale_ptr + scale_place(n, False), mask=in_n, other=0.0).to(tl.float32)[:, None]
    if SPLIT_K > 1:
        sum_at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last_arriver(
            total, partial_ptr, counter_ptr, tl.program_id(0), split, sum_at, SPLIT_K, BLOCK_N, BLOCK_T
        ):
            return
        total = reduce_partials(partial_ptr, counter_ptr, tl.program_id(0), sum_at, SPLIT_K, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + row.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & (row < num_rows)[None, :])


def gemm_8bit(x: Tensor, weight: QuantWeight, tile: Tile, norm: Norm | None = None, gated: bool = False) -> Tensor:
    """x [T, K] (rows dense), a weight of integers as in `kernels.ops`, all contiguous -> [T, out_size] in x's dtype.

    norm, gated: what is done to x before it is quantised (`kernels.quant.activations`); gated: x is [T, 2 * K].
    int8 has one scale a row and no zero, int4 groups of a multiple of 128 or of all columns. A tile has a multiple of 64 as rows of the weight, up to 128 rows of x and 128 columns to a step.
    """
    qweight, scale, zero, bias, group, out_size, _ = weight
    rows, size = len(x), width(x, gated)
    if tile.block_n % SIZE.value or tile.block_k != STEP.value or tile.block_t > 2 * ROWS_AT_ONCE:
        raise ValueError(
            f"{tile} is not made of blocks of {SIZE.value} x {STEP.value} for up to {2 * ROWS_AT_ONCE} rows"
        )
    int4 = qweight.dtype == torch.uint8
    if not has_gemm_8bit(weight.kind, group, size, zero is not None):
        raise ValueError(
            f"groups of {group} columns{' with zeros' if zero is not None else ''} of {qweight.dtype} have no GEMM of 8 bits"
        )
    block_t = min(tile.block_t, max(16, triton.next_power_of_2(rows)))
    if int4:
        x_q, x_scale, x_sum = e4m3_rows(x, block_t, norm, gated)
    else:
        x_q, x_scale = int8_rows(x, block_t, norm, gated)
        x_sum = x_scale
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(out_size, tile.block_n) * triton.cdiv(rows, block_t)
    partial, counters = partial_buffers(tile, programs, block_t, out)
    gemm_8bit_kernel[programs, tile.split_k](
        out,
        partial,
        counters,
        x_q,
        x_scale,
        x_sum,
        qweight,
        scale,
        scale if zero is None else zero,
        scale if bias is None else bias,
        rows,
        len(x_q),
        N=out_size,
        K=size,
        GROUP=group,
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        SPLIT_K=tile.split_k,
        PARTS=max(1, block_t // ROWS_AT_ONCE),
        STAGES=tile.num_stages,
        INT4=int4,
        HAS_ZERO=zero is not None,
        HAS_BIAS=bias is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out
