"""Triton: x @ weight.T with a quantised weight in the tensor cores' layout (`reference.repack`).

A thread loads the very values of its operand, so a weight goes from memory through registers to the tensor cores and waits for no
other thread: it is dequantised by packed arithmetic, gets the scale and zero of its group in one multiply-add, and is rounded as
`dequantize` rounds it. Whole rows with one scale and no zero are multiplied as integers, and scaled at the end. Integers lie block
by block, scales beside them; 8-bit floats row by row, columns exchanged within 64, so that PyTorch's product takes them too. The
weight is the left operand, and its columns may be split (`kernels.linear.split_k`). `dequantize_repacked` writes such a weight
out, for GEMMs of more rows. Knows sizes and layouts; which way suits which is data in `kernels/quant/tiles.py`.

Weights lie in the tensor cores' layout: each thread loads the very values that its registers hand to the tensor core,
so a weight goes through no shared memory once dequantised, and no thread waits for another. Laid row by row it was
written to shared memory as bfloat16 and read again. One kernel serves 4 and 8 bits, integers and floats, and groups
down to 32 and 16 columns at nearly the same cost. 8-bit floats keep their rows, with columns exchanged within 64,
which PyTorch's FP8 GEMM takes as well: x is exchanged where it is quantised.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.split_k import is_last_arriver, partial_buffers, reduce_partials
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.dequant import e2m1_codes, e8m0, halves, nibbles, scaled, settled, wide_bytes
from pagegraph.kernels.quant.weight import QuantWeight

SIZE = tl.constexpr(reference.REPACK_BLOCK)  # rows and columns of a block of the weight
THREADS = tl.constexpr(128)  # that hold a block
MAX_BLOCK_T = 64  # of float32, which takes twice the room; else the tile says
BLOCKS = 4  # side by side, to a program that writes the weight out


@triton.jit
def _at(values, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """Scales of a block [threads, 2 * groups] -> of its first or second 32 columns: [threads, groups, 2]; of both, where there is but one."""
    threads: tl.constexpr = values.shape[0]
    if GROUPS == 1:
        return values.reshape(threads, 1, 2)
    else:
        first, second = tl.split(values.reshape(threads, 2, GROUPS // 2, 2).permute(0, 2, 3, 1))
        return second if HALF else first


@triton.jit
def _half(
    qweight,
    scale,
    zero,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """int8 [threads, 16], columns 32 * HALF to 32 on of blocks below each other -> the weight [rows, 32]."""
    threads: tl.constexpr = qweight.shape[0]
    wide = wide_bytes(qweight, DTYPE)
    if WHOLE:
        scales = _at(scale, GROUPS, HALF)
        groups: tl.constexpr = scales.shape[1]
        wide = wide.reshape(threads, groups, 4 // groups, 2, 2)
        scales = scales.reshape(threads, groups, 1, 2, 1)
        zeros = _at(zero, GROUPS, HALF).reshape(threads, groups, 1, 2, 1)
        wide = scaled(wide, scales, zeros, HAS_ZERO)
    # Threads are 8 rows of 4 by warps of 16 rows; elements are steps of 16 columns, halves of 8, rows 8 apart, neighbours.
    parts = wide.reshape(threads // 32, 8, 4, 2, 2, 2, 2)
    return parts.permute(0, 5, 1, 3, 4, 2, 6).reshape(threads // 2, 32)


@triton.jit
def weight_of(
    qweight_at,
    scale,
    zero,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Values of blocks below each other at [threads, 16], scales and zeros of their groups [threads, 2 * groups] -> the weight [rows, 64].

    The first of a pair of scales is of the upper row of a thread, the second of that 8 rows on.
    """
    threads: tl.constexpr = qweight_at.shape[0]
    qweight = tl.load(qweight_at, eviction_policy="evict_first")
    if KIND != "int8":
        if KIND == "int4":
            upper, lower = nibbles(qweight, DTYPE)
        else:
            upper, lower = e2m1_codes(qweight, DTYPE)
            scale = e8m0(scale)
        if WHOLE:
            upper, lower = upper.reshape(threads, GROUPS, 16 // GROUPS), lower.reshape(threads, GROUPS, 16 // GROUPS)
            upper_scale, lower_scale = tl.split(scale.reshape(threads, GROUPS, 1, 2))
            upper_zero, lower_zero = tl.split(zero.reshape(threads, GROUPS, 1, 2))
            upper, lower = (
                scaled(upper, upper_scale, upper_zero, HAS_ZERO),
                scaled(lower, lower_scale, lower_zero, HAS_ZERO),
            )
        # Elements are steps of 16 columns, halves of 8, neighbours; the last are rows 8 apart.
        parts = tl.join(upper.reshape(threads, 16), lower.reshape(threads, 16)).reshape(threads // 32, 8, 4, 4, 2, 2, 2)
        return parts.permute(0, 6, 1, 3, 4, 2, 5).reshape(threads // 2, SIZE)
    else:
        more = tl.load(qweight_at + THREADS * 16, eviction_policy="evict_first")
        first = _half(qweight, scale, zero, DTYPE, GROUPS, False, WHOLE, HAS_ZERO)
        second = _half(more, scale, zero, DTYPE, GROUPS, True, WHOLE, HAS_ZERO)
        return tl.join(first, second).permute(0, 2, 1).reshape(threads // 2, SIZE)


@triton.jit
def float_weight_of(
    qweight_ptr, scale_ptr, row, at, start, DTYPE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """8-bit floats from column `start` on; thread `at` [threads] of 128 to a block from `row` on -> the weight [rows, 64]."""
    threads: tl.constexpr = at.shape[0]
    stride: tl.constexpr = (K + SIZE - 1) // SIZE * SIZE
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    upper_row = row + at // 32 * 16 + at % 32 // 4
    lower_row = tl.minimum(upper_row + 8, N - 1).to(
        tl.int64
    )  # rows past the last are the last again: nothing of them is stored
    upper_row = tl.minimum(upper_row, N - 1).to(tl.int64)
    column = (start + at % 4 * 16)[:, None] + tl.arange(0, 16)[None, :]
    upper = tl.load(qweight_ptr + upper_row[:, None] * stride + column, eviction_policy="evict_first").to(tl.float32)
    lower = tl.load(qweight_ptr + lower_row[:, None] * stride + column, eviction_policy="evict_first").to(tl.float32)
    # By float32: straight to bfloat16 it takes the slower converter.
    if WHOLE:
        upper = (upper * tl.load(scale_ptr + upper_row * groups + start // GROUP)[:, None]).to(DTYPE)
        lower = (lower * tl.load(scale_ptr + lower_row * groups + start // GROUP)[:, None]).to(DTYPE)
    else:
        upper, lower = halves(upper, DTYPE), halves(lower, DTYPE)
    # Elements are as those of 4 bits.
    parts = tl.join(upper, lower).reshape(threads // 32, 8, 4, 4, 2, 2, 2)
    return parts.permute(0, 6, 1, 3, 4, 2, 5).reshape(threads // 2, SIZE)


@triton.jit
def scale_place(n, FLOATS: tl.constexpr):
    """Where the scales of rows n are, one a row: 8-bit floats keep their order, integers have pairs of rows 8 apart (`reference.repack_scales`)."""
    return n if FLOATS else n // 16 * 16 + n % 8 * 2 + n % 16 // 8


@triton.constexpr_function
def block_bytes(kind):
    """Of 64 rows and columns."""
    return 64 * 64 if kind == "int8" else 64 * 64 // 2


@triton.jit
def places_of(
    qweight_ptr, row_block, at, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Of thread `at` of 128 in a block of integers, in a row of blocks: where its values begin, and its scales, which are counted."""
    BYTES: tl.constexpr = block_bytes(KIND)
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    qweight_at = qweight_ptr + (row_block * blocks * BYTES + at * 16)[:, None] + tl.arange(0, 16)[None, :]
    # Of scales a block has those of its GROUPS groups side by side for each pair of rows, or a group of several blocks has one pair.
    pair_at = (row_block * ((K + max(GROUP, SIZE) - 1) // max(GROUP, SIZE)) * SIZE + at // 4 * 2)[
        :, None
    ] * GROUPS + tl.arange(0, 2 * GROUPS)[None, :]
    return qweight_at, pair_at


@triton.jit
def sums_of(
    x_at,
    in_t,
    qweight_ptr,
    qweight_at,
    scale_ptr,
    zero_ptr,
    pair_at,
    row,
    at,
    begin,
    end,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Over columns from begin to end: rows of the weight times x at [64, T] of the first columns, float32 [rows, T].

    `places_of` gives the places of integers; row [threads] is that in which the block of a thread begins, of 8-bit floats.
    """
    threads: tl.constexpr = at.shape[0]
    BYTES: tl.constexpr = block_bytes(KIND)
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    column = tl.arange(0, SIZE)
    total = tl.zeros([threads // 2, x_at.shape[1]], tl.float32)
    scale = tl.zeros([threads, 2 * GROUPS], scale_ptr.dtype.element_ty)
    zero = scale
    for k in range(begin, end, BLOCK_K):
        for part in tl.static_range(BLOCK_K // SIZE):
            start = k + part * SIZE
            in_x = in_t
            if K % BLOCK_K != 0:
                in_x = in_x & (column < K - start)[:, None]
                start = tl.minimum(start, (blocks - 1) * SIZE)
            x = tl.load(x_at + (k + part * SIZE), mask=in_x, other=0.0)
            if KIND == "fp8":
                weight = float_weight_of(qweight_ptr, scale_ptr, row, at, start, x.dtype, N, K, GROUP, WHOLE)
            else:
                if WHOLE and (part == 0 or GROUP % BLOCK_K != 0):  # else the step lies in one group
                    group_at = start // max(GROUP, SIZE) * (SIZE * GROUPS)
                    scale = tl.load(scale_ptr + pair_at + group_at)
                    zero = scale
                    if HAS_ZERO:
                        zero = tl.load(zero_ptr + pair_at + group_at)
                weight = weight_of(
                    qweight_at + start // SIZE * BYTES, scale, zero, x.dtype, GROUPS, KIND, WHOLE, HAS_ZERO
                )
            total = tl.dot(weight, x, total, input_precision=PRECISION)
        total = settled(total)
    return total


@triton.jit(do_not_specialize=["num_rows"])  # 2 and 8 rows, 64 and 256, share a kernel
def gemm_16bit_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
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
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_T)  # those that read the same weights run side by side
    tile = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    t = tl.program_id(0) % row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = (t < num_rows)[None, :]
    span: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    begin = split * span
    # Two threads to each row of a tile; blocks past the last row of the weight are those of the last again: nothing of them is stored.
    thread = tl.arange(0, 2 * BLOCK_N)
    row_block = tl.minimum(tile * (BLOCK_N // SIZE) + thread // THREADS, (N + SIZE - 1) // SIZE - 1).to(tl.int64)
    at = thread % THREADS
    qweight_at, pair_at = places_of(qweight_ptr, row_block, at, K, GROUP, GROUPS, KIND)
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + tl.arange(0, SIZE)[:, None]
    if PDL:
        wait()
    total = sums_of(
        x_at, in_t, qweight_ptr, qweight_at, scale_ptr, zero_ptr, pair_at, tile * BLOCK_N + thread // THREADS * SIZE, at,
        begin, tl.maximum(begin, tl.minimum(begin + span, K)), N, K, GROUP, GROUPS, BLOCK_K, KIND, WHOLE, HAS_ZERO, PRECISION,
    )  # fmt: skip
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    if not WHOLE:
        total *= tl.load(scale_ptr + scale_place(n, KIND == "fp8"), mask=in_n, other=0.0).to(tl.float32)[:, None]
    if SPLIT_K > 1:
        part_at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last_arriver(
            total, partial_ptr, counter_ptr, tl.program_id(0), split, part_at, SPLIT_K, BLOCK_N, BLOCK_T
        ):
            return
        total = reduce_partials(partial_ptr, counter_ptr, tl.program_id(0), part_at, SPLIT_K, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_t)


def gemm_16bit(x: Tensor, weight: QuantWeight, tile: Tile) -> Tensor:
    """x [T, K] (rows dense), the weight as in `kernels.ops`, all contiguous -> [T, out_size] in x's dtype.

    A tile has multiples of 64 as rows of the weight, and as columns of a step.
    """
    qweight, scale, zero, bias, group, out_size, _ = weight
    rows, size = x.shape
    if tile.block_n % SIZE.value or tile.block_k % SIZE.value:
        raise ValueError(
            f"a tile of {tile.block_n} x {tile.block_k} is not made of blocks of {SIZE.value} x {SIZE.value}"
        )
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    max_t = tile.block_t if x.element_size() == 2 else MAX_BLOCK_T
    block_t = min(max_t, max(16, triton.next_power_of_2(rows)))
    programs = triton.cdiv(out_size, tile.block_n) * triton.cdiv(rows, block_t)
    partial, counters = partial_buffers(tile, programs, block_t, out)
    gemm_16bit_kernel[programs, tile.split_k](
        out,
        partial,
        counters,
        x,
        qweight,
        scale,
        scale if zero is None else zero,
        scale if bias is None else bias,
        rows,
        x.stride(0),
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=groups_of(scale),
        BLOCK_T=block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        KIND=weight.kind,
        WHOLE=zero is not None or group < size,
        HAS_ZERO=zero is not None,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out


@triton.jit
def dequantize_repacked_kernel(
    out_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    BYTES: tl.constexpr = block_bytes(KIND)
    row_block = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, THREADS)
    n = row_block * SIZE + tl.arange(0, SIZE)
    qweight_at, pair_at = places_of(qweight_ptr, row_block, at, K, GROUP, GROUPS, KIND)
    for part in tl.static_range(BLOCKS):
        block = tl.program_id(1) * BLOCKS + part
        column = block * SIZE + tl.arange(0, SIZE)
        held = tl.minimum(block, blocks - 1)
        if KIND == "fp8":
            weight = float_weight_of(
                qweight_ptr, scale_ptr, row_block * SIZE, at, held * SIZE, out_ptr.dtype.element_ty, N, K, GROUP, True
            )
        else:
            group_at = held * SIZE // max(GROUP, SIZE) * (SIZE * GROUPS)
            scale = tl.load(scale_ptr + pair_at + group_at)
            zero = scale
            if HAS_ZERO:
                zero = tl.load(zero_ptr + pair_at + group_at)
            weight = weight_of(
                qweight_at + held * BYTES, scale, zero, out_ptr.dtype.element_ty, GROUPS, KIND, True, HAS_ZERO
            )
        tl.store(out_ptr + n[:, None] * K + column[None, :], weight, mask=(n < N)[:, None] & (column < K)[None, :])


def dequantize_repacked(weight: QuantWeight, size: int, dtype: torch.dtype) -> Tensor:
    """The weight as in `kernels.ops`, all contiguous -> [out_size, size] in dtype, rounded once. Its bias is not looked at."""
    qweight, scale, zero, _, group, out_size, _ = weight
    out = torch.empty(out_size, size, dtype=dtype, device=qweight.device)
    dequantize_repacked_kernel[triton.cdiv(out_size, SIZE.value), triton.cdiv(size, SIZE.value * BLOCKS)](
        out,
        qweight,
        scale,
        scale if zero is None else zero,
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=groups_of(scale),
        BLOCKS=BLOCKS,
        KIND=weight.kind,
        HAS_ZERO=zero is not None,
        num_warps=4,
    )
    return out


def groups_of(scale: Tensor) -> int:
    """Of a block of integers."""
    return scale.shape[3] // 2 if scale.dim() == 4 else 1
