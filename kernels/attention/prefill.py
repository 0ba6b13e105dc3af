"""Triton: paged attention of ragged rows, for the sequences of a step that have more than one row.

One program computes a tile of one sequence's rows and one KV head; its matrix rows are (token, query head of
the group), so a group of any size fills it. Tiles of keys that every row sees skip the mask. The weights of a
tile of keys meet its values one iteration later, after the next tile's logits have been issued: the matrix
units multiply weights and values while the other units exponentiate. The grid depends on sizes alone:
T // tile + S tiles hold any division of T rows among S sequences; tiles left over end at once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.attention.softmax import (
    LOG2E,
    converted,
    dot_precision,
    first_key,
    last_not_above,
    to_base2,
    weigh,
)
from pagegraph.kernels.gpu import Gpu, measured


class Tile(NamedTuple):
    """How one program of the prefill kernel is cut."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By (bytes an element, padded head size).
TILES: dict[Gpu, dict[tuple[int, int], Tile]] = {
    "H200": {
        (2, 16): Tile(64, 64, 4, 3),
        (2, 32): Tile(64, 64, 4, 3),
        (2, 64): Tile(128, 64, 8, 3),
        (2, 128): Tile(64, 64, 4, 3),
        (2, 256): Tile(64, 64, 8, 2),
        (4, 16): Tile(32, 32, 4, 2),
        (4, 32): Tile(32, 32, 4, 2),
        (4, 64): Tile(32, 32, 8, 2),
        (4, 128): Tile(32, 32, 8, 2),
        (4, 256): Tile(32, 16, 8, 2),
    },
}


@triton.jit
def slot_of(block, token, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        block = block.to(tl.int64)
    return block * BLOCK_SIZE + (token % BLOCK_SIZE).to(tl.int32)


@triton.jit
def masked(logits, position, start, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    token = start + tl.arange(0, BLOCK_N)
    seen = token[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (token[None, :] > position[:, None] - WINDOW)
    if CHUNK > 0:
        seen = seen & (token[None, :] // CHUNK == position[:, None] // CHUNK)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def rows_of(head_ptr, slot, STRIDE: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr):
    """One head's rows [slots, PAD] of a cache."""
    column = tl.arange(0, PAD)
    at = head_ptr + (slot * STRIDE)[:, None] + column[None, :]
    if SIZE == PAD:
        return tl.load(at)
    else:
        return tl.load(at, mask=(column < SIZE)[None, :], other=0.0)


@triton.jit
def _pack(weights, dtype: tl.constexpr, OPAQUE: tl.constexpr):
    """Float32 weights rounded to `dtype`, as 32-bit integers that hold two neighbours where it has 16 bits.

    So they are carried to the next iteration in registers: Triton would pass carried floats through shared memory,
    and LLVM shuffles the halves of registers that hold 16 bits each.
    """
    if dtype == tl.float32:
        packed = weights.to(tl.uint32, bitcast=True)
    else:
        low, high = tl.split(weights.reshape(weights.shape[0], weights.shape[1] // 2, 2))
        if OPAQUE:
            rounding: tl.constexpr = (
                "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
            )
            packed = tl.inline_asm_elementwise(rounding, "=r,r,r", [low, high], tl.uint32, is_pure=True, pack=1)
        else:
            low = low.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
            packed = low | (high.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    return packed


@triton.jit
def _unpack(packed, nothing, dtype: tl.constexpr, OPAQUE: tl.constexpr):
    """What `_pack` packed.

    `nothing` is a 0 that the compiler must not know: the "or" gives the product registers of its own. Where the next
    weights are written to registers that a running product reads, ptxas waits for every product (its note C7513).
    """
    if dtype == tl.float32:
        weights = packed.to(dtype, bitcast=True)
    else:
        if OPAQUE:
            low, high = tl.inline_asm_elementwise(
                "{.reg .b32 both; or.b32 both, $2, $3; mov.b32 {$0, $1}, both;}",
                "=h,=h,r,r",
                [packed, nothing],
                (tl.uint16, tl.uint16),
                is_pure=True,
                pack=1,
            )
        else:
            low, high = (packed & 0xFFFF).to(tl.uint16), (packed >> 16).to(tl.uint16)
        weights = tl.join(low, high).reshape(packed.shape[0], packed.shape[1] * 2).to(dtype, bitcast=True)
    return weights


@triton.jit
def _accumulate(acc, alpha, weights, nothing, values, PRECISION: tl.constexpr, OPAQUE: tl.constexpr):
    return tl.dot(
        _unpack(weights, nothing, values.dtype, OPAQUE), values, acc * alpha[:, None], input_precision=PRECISION
    )


@triton.jit(do_not_specialize=["num_seqs"])
def prefill_kernel(
    out_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    sinks_ptr,
    scale,
    num_seqs,
    query_token_stride,
    query_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDE: tl.constexpr,
    OPAQUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Late tiles see the most keys: they start first, all heads of one together.
    tile = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    sequence = last_not_above(query_start_ptr, tile, num_seqs, tile, BLOCK_Q)
    row_begin = tl.load(query_start_ptr + sequence)
    count = tl.load(query_start_ptr + sequence + 1) - row_begin
    first = (tile - (row_begin // BLOCK_Q + sequence)) * BLOCK_Q
    if count <= 1:  # a decode row is another kernel's
        return
    if first >= count:
        return

    lane = tl.arange(0, BLOCK_M)
    token = first + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    live = (lane < BLOCK_Q * GROUP) & (token < count)
    offset = tl.load(seq_lens_ptr + sequence) - count
    position = offset + token
    row = (row_begin + token).to(tl.int64)
    key_column = tl.arange(0, HEAD_PAD)
    query = tl.load(
        query_ptr + row[:, None] * query_token_stride + head[:, None] * query_head_stride + key_column[None, :],
        mask=live[:, None] & (key_column < HEAD_SIZE)[None, :],
        other=0.0,
    )
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        m_i = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        l_i = l_i + 1.0
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    alpha = l_i * 0.0
    nothing = tl.minimum(num_seqs, 0).to(tl.uint32)
    weights = _pack(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), query.dtype, OPAQUE)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    key_ptr = key_cache_ptr + kv_head * HEAD_SIZE
    value_ptr = value_cache_ptr + kv_head * VALUE_SIZE
    lowest = offset + first
    begin = first_key(lowest, WINDOW, CHUNK)
    end = offset + tl.minimum(first + BLOCK_Q, count)
    last = (end - 1).to(tl.uint32)  # lanes past it read it: a weight of 0 must not meet what an unused slot holds
    key_lane = tl.arange(0, BLOCK_N)
    at = tl.minimum((begin + key_lane).to(tl.uint32), last)
    block = tl.load(table_ptr + at // BLOCK_SIZE)
    before = slot_of(block, at, BLOCK_SIZE, WIDE)  # the first weights, all 0, meet the first tile's values
    for start in range(begin, end, BLOCK_N):
        slot = slot_of(block, tl.minimum((start + key_lane).to(tl.uint32), last), BLOCK_SIZE, WIDE)
        # Block ids are carried one tile ahead, as in the decode kernel.
        block = tl.load(table_ptr + tl.minimum((start + BLOCK_N + key_lane).to(tl.uint32), last) // BLOCK_SIZE)
        keys = converted(rows_of(key_ptr, slot, KV_HEADS * HEAD_SIZE, HEAD_SIZE, HEAD_PAD), query.dtype)
        values = converted(rows_of(value_ptr, before, KV_HEADS * VALUE_SIZE, VALUE_SIZE, VALUE_PAD), query.dtype)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        acc = _accumulate(acc, alpha, weights, nothing, values, PRECISION, OPAQUE)
        if SOFTCAP > 0:
            logits = to_base2(logits, scale, SOFTCAP)
        if (WINDOW > 0) or (CHUNK > 0):
            logits = masked(logits, position, start, BLOCK_N, WINDOW, CHUNK)
        elif start + BLOCK_N > lowest + 1:
            logits = masked(logits, position, start, BLOCK_N, WINDOW, CHUNK)
        weighed, m_i, l_i, alpha = weigh(logits, 1.0 if SOFTCAP > 0 else scale, m_i, l_i, (WINDOW > 0) | (CHUNK > 0))
        weights = _pack(weighed, values.dtype, OPAQUE)
        before = slot
    values = converted(rows_of(value_ptr, before, KV_HEADS * VALUE_SIZE, VALUE_SIZE, VALUE_PAD), query.dtype)
    acc = _accumulate(acc, alpha, weights, nothing, values, PRECISION, OPAQUE)
    # Where the rows go is worked out anew: kept through the loop, it would cost registers that the tiles need.
    row_begin = tl.load(query_start_ptr + sequence, volatile=True)
    count = tl.load(query_start_ptr + sequence + 1, volatile=True) - row_begin
    token = (tile - (row_begin // BLOCK_Q + sequence)) * BLOCK_Q + lane // GROUP
    live = (lane < BLOCK_Q * GROUP) & (token < count)
    row = (row_begin + token).to(tl.int64)
    value_column = tl.arange(0, VALUE_PAD)
    tl.store(
        out_ptr + (row[:, None] * KV_HEADS * GROUP + head[:, None]) * VALUE_SIZE + value_column[None, :],
        (acc / l_i[:, None]).to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (value_column < VALUE_SIZE)[None, :],
    )


def attend_ragged(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> None:
    """Write the rows of out [T, Hq, Dv] that belong to sequences with two rows or more."""
    tokens, heads, head_size = query.shape
    block_size, kv_heads, value_size = value_cache.shape[1:]
    group = heads // kv_heads
    num_seqs = block_tables.shape[0]
    head_pad, value_pad = max(16, triton.next_power_of_2(head_size)), max(16, triton.next_power_of_2(value_size))
    tile = measured(TILES, query.device)[query.element_size(), max(head_pad, value_pad)]
    block_m = max(tile.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    prefill_kernel[((tokens // block_q + num_seqs) * kv_heads,)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        seq_lens,
        sinks if sinks is not None else query,
        scale if softcap else scale * LOG2E,
        num_seqs,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_SIZE=head_size,
        VALUE_SIZE=value_size,
        HEAD_PAD=head_pad,
        VALUE_PAD=value_pad,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=tile.block_n,
        WINDOW=window,
        CHUNK=chunk,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        WIDE=max(key_cache.numel(), value_cache.numel()) >= 2**31,
        OPAQUE=query.device.type != "cpu",  # the interpreter knows no inline assembly
        PRECISION=dot_precision(2 * max(head_pad, value_pad)),  # twice: weights wait in registers too
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
