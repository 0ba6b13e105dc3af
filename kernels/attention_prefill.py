"""Triton: paged attention of ragged rows, for the sequences of a step that have more than one row.

One program computes a tile of one sequence's rows and one KV head; its matrix rows are (token, query head of
the group), so a group of any size fills it. Keys that every row sees are taken without a mask; the diagonal,
and all keys where a window or a chunk bounds them from below, with one. The grid depends on sizes alone:
T // tile + S tiles hold any division of T rows among S sequences; tiles left over end at once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.online_softmax import LOG2E, dot_precision, first_key, last_not_above, to_base2, update


class Tile(NamedTuple):
    """How one program of the prefill kernel is cut."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By (bytes an element, padded head size).
TILES: dict[tuple[int, int], Tile] = {
    (2, 16): Tile(64, 64, 4, 3),
    (2, 32): Tile(64, 64, 4, 3),
    (2, 64): Tile(128, 64, 8, 3),
    (2, 128): Tile(64, 64, 4, 3),
    (2, 256): Tile(64, 64, 8, 2),
    (4, 16): Tile(32, 32, 4, 2),
    (4, 32): Tile(32, 32, 4, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 4, 2),
    (4, 256): Tile(32, 16, 8, 2),
}


@triton.jit
def _attend_range(
    query,
    position,
    begin,
    end,
    peak,
    total,
    mixed,
    key_cache_ptr,
    value_cache_ptr,
    table_ptr,
    kv_head,
    scale,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys begin..end of one sequence; unless MASKED, whole tiles that every row sees."""
    lane = tl.arange(0, BLOCK_N)
    key_column = tl.arange(0, HEAD_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    # Page ids are carried one tile ahead, as in the decode kernel.
    page = tl.load(table_ptr + (begin + lane) // BLOCK_SIZE, mask=begin + lane < end, other=0)
    for start in range(begin, end, BLOCK_N):
        token = start + lane
        slot = page.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        page = tl.load(table_ptr + (token + BLOCK_N) // BLOCK_SIZE, mask=token + BLOCK_N < end, other=0)
        key_mask = (key_column < HEAD_SIZE)[:, None]
        value_mask = (value_column < VALUE_SIZE)[None, :]
        if MASKED:
            key_mask = key_mask & (token < end)[None, :]
            value_mask = value_mask & (token < end)[:, None]
        keys = tl.load(
            key_cache_ptr + (slot[None, :] * KV_HEADS + kv_head) * HEAD_SIZE + key_column[:, None], mask=key_mask, other=0.0
        )
        values = tl.load(
            value_cache_ptr + (slot[:, None] * KV_HEADS + kv_head) * VALUE_SIZE + value_column[None, :],
            mask=value_mask,
            other=0.0,
        )
        logits = to_base2(tl.dot(query, keys, input_precision=PRECISION), scale, SOFTCAP)
        if MASKED:
            seen = (token[None, :] <= position[:, None]) & (token < end)[None, :]
            if WINDOW > 0:
                seen = seen & (token[None, :] > position[:, None] - WINDOW)
            if CHUNK > 0:
                seen = seen & (token[None, :] // CHUNK == position[:, None] // CHUNK)
            logits = tl.where(seen, logits, float("-inf"))
        peak, total, mixed = update(logits, values, peak, total, mixed, PRECISION)
    return peak, total, mixed


@triton.jit
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
    PRECISION: tl.constexpr,
):
    # Late tiles see the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
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
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        peak = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        total = total + 1.0
    mixed = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    lowest = offset + first
    begin = first_key(lowest, WINDOW, CHUNK)
    end = offset + tl.minimum(first + BLOCK_Q, count)
    if (WINDOW == 0) and (CHUNK == 0):
        body = (lowest + 1) // BLOCK_N * BLOCK_N
        peak, total, mixed = _attend_range(
            query, position, begin, body, peak, total, mixed, key_cache_ptr, value_cache_ptr, table_ptr, kv_head, scale,
            BLOCK_SIZE, KV_HEADS, HEAD_SIZE, VALUE_SIZE, HEAD_PAD, VALUE_PAD, BLOCK_N, WINDOW, CHUNK, SOFTCAP, False, PRECISION,
        )  # fmt: skip
        begin = body
    peak, total, mixed = _attend_range(
        query, position, begin, end, peak, total, mixed, key_cache_ptr, value_cache_ptr, table_ptr, kv_head, scale,
        BLOCK_SIZE, KV_HEADS, HEAD_SIZE, VALUE_SIZE, HEAD_PAD, VALUE_PAD, BLOCK_N, WINDOW, CHUNK, SOFTCAP, True, PRECISION,
    )  # fmt: skip
    value_column = tl.arange(0, VALUE_PAD)
    tl.store(
        out_ptr + (row[:, None] * KV_HEADS * GROUP + head[:, None]) * VALUE_SIZE + value_column[None, :],
        (mixed / total[:, None]).to(out_ptr.dtype.element_ty),
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
    tile = TILES[key_cache.element_size(), max(head_pad, value_pad)]
    block_m = max(tile.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    prefill_kernel[tokens // block_q + num_seqs, kv_heads](
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
        PRECISION=dot_precision(max(head_pad, value_pad)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
