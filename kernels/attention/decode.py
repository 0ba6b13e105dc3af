"""Triton: paged attention of single query tokens, split along the keys.

One program computes one query token, one KV head and one split; the query heads that share the KV head are its BLOCK_M axis.
The last of a token's splits to arrive merges them, in order, so the result does not depend on timing. With BY_TOKEN the
kernel looks up the sequence of each query token, so it is right for any ragged step (verification of a few draft tokens
among them); otherwise it computes the sequences that have one query token and leaves the rest to `attention.prefill`. The
grid depends on sizes alone; lengths are read on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.attention.softmax import (
    LOG2E,
    converted,
    dot_precision,
    first_key,
    last_not_above,
    levelled,
    of_pairs,
    to_base2,
    update,
)
from pagegraph.kernels.gpu import Gpu, measured
from pagegraph.kernels.pdl import arrival_counts, dependent, wait


class Tile(NamedTuple):
    """How one program of the decode kernel is cut, and into how many programs at least a step that is long enough."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 528  # four waves' worth of the 132 SMs of an H100 or H200
    sum_late: bool = False  # weights are summed up after the last tile: fewer meetings of the warps, more registers


# By (bytes an element of the blocks, padded head size). Float32, whatever the blocks hold, is computed by FMA in full
# precision and needs the registers.
TILES: dict[Gpu, dict[tuple[int, int], Tile]] = {
    "H200": {
        (1, 32): Tile(64, 4, 4),
        (1, 64): Tile(64, 4, 4, sum_late=True),
        (1, 128): Tile(64, 2, 3, 264, sum_late=True),
        (1, 256): Tile(32, 4, 4, sum_late=True),
        (2, 16): Tile(64, 4, 4),
        (2, 32): Tile(64, 4, 4),
        (2, 64): Tile(64, 4, 4),
        (2, 128): Tile(64, 4, 3),
        (2, 256): Tile(32, 4, 3),
        (4, 16): Tile(32, 4, 3),
        (4, 32): Tile(32, 4, 3),
        (4, 64): Tile(32, 4, 3),
        (4, 128): Tile(16, 4, 3),
        (4, 256): Tile(16, 4, 2),
    },
}
MIN_SPLIT = 128  # keys: with few sequences even short ones are shared out
MAX_SPLIT = 8192  # keys; one long sequence in a large batch must not run on one program
MAX_SPLITS = 32


@triton.jit
def split_span(length, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """Keys a split takes of `length` keys: equal shares in whole tiles, at least MIN_SPLIT."""
    span = (length + NUM_SPLITS - 1) // NUM_SPLITS
    span = (span + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return tl.maximum(span, MIN_SPLIT)


@triton.jit
def locate(index, query_start_ptr, seq_lens_ptr, num_seqs, BY_TOKEN: tl.constexpr):
    """Program index -> (row, sequence, position of the row, whether there is work)."""
    if BY_TOKEN:
        row = index
        sequence = last_not_above(query_start_ptr, row, num_seqs, row, 1)
        end = tl.load(query_start_ptr + sequence + 1)
        live = row < end
    else:
        sequence = index
        row = tl.load(query_start_ptr + sequence)
        end = tl.load(query_start_ptr + sequence + 1)
        live = end - row == 1
    position = tl.load(seq_lens_ptr + sequence) - (end - row)
    return row, sequence, position, live


@triton.jit
def load_tile(cache_ptr, slot, inside, kv_head, column, KV_HEADS: tl.constexpr, SIZE: tl.constexpr):
    """A tile of one head's keys or values: slot, inside and column broadcast, [columns, slots] of keys, [slots, columns] of values.

    Lanes that are not inside are not read, so what unused slots hold cannot reach a sum.
    """
    return tl.load(cache_ptr + (slot * KV_HEADS + kv_head) * SIZE + column, mask=inside & (column < SIZE), other=0)


@triton.jit
def first_sums(sinks_ptr, head, mask, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr):
    """m_i and l_i [BLOCK_M] before the first key: a sink is one more logit of the denominator where mask is set."""
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=mask, other=float("-inf")).to(tl.float32)
        m_i = sink * 1.4426950408889634
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    return m_i, l_i


@triton.jit
def store_split(acc, m_i, l_i, acc_ptr, m_ptr, l_ptr, at, column, in_m, mask, arrival_ptr, VALUE_SIZE: tl.constexpr):
    """Store what a split found at `at` [BLOCK_M] -> how many splits of the row have been stored before."""
    tl.store(m_ptr + at, m_i, mask=in_m)
    tl.store(l_ptr + at, l_i, mask=in_m)
    tl.store(acc_ptr + at[:, None] * VALUE_SIZE + column[None, :], acc, mask=mask)
    tl.debug_barrier()  # every thread's share is stored before the arrival is counted
    return tl.atomic_add(arrival_ptr, 1, sem="acq_rel")


@triton.jit
def merge_splits(
    acc_ptr, m_ptr, l_ptr, at, column, in_m, mask, used,
    STRIDE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, VALUE_PAD] and l_i [BLOCK_M] of `used` splits, in their order; the first is stored at `at`, others STRIDE on."""
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    for other in range(0, used):
        there = at + other * STRIDE
        # Past the first-level cache, which does not see what other programs store.
        m_there = tl.load(m_ptr + there, mask=in_m, other=0.0, cache_modifier=".cg")
        l_there = tl.load(l_ptr + there, mask=in_m, other=1.0, cache_modifier=".cg")
        acc_there = tl.load(
            acc_ptr + there[:, None] * VALUE_SIZE + column[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        m_new = tl.maximum(m_i, m_there)
        keep, take = tl.exp2(m_i - m_new), tl.exp2(m_there - m_new)
        l_i = l_i * keep + l_there * take
        acc = acc * keep[:, None] + acc_there * take[:, None]
        m_i = m_new
    return acc, l_i


@triton.jit
def load_query(
    query_ptr, head, grouped, scale, head_stride,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """A row's query heads [BLOCK_M, HEAD_PAD] -> (operand, second operand, scale of their products with keys).

    PAIRED: the operands are the first and the second elements of each pair, float16, and the scale is [BLOCK_M, 1].
    """
    column = tl.arange(0, HEAD_PAD)
    query = tl.load(
        query_ptr + head[:, None] * head_stride + column[None, :],
        mask=grouped[:, None] & (column < HEAD_SIZE)[None, :],
        other=0.0,
    )
    if PAIRED:
        # Multiplied in float16, which holds e4m3 exactly and weights more precisely than bfloat16.
        if query.dtype != tl.float32:
            query, level = levelled(query)
            scale = level[:, None] * scale
        query, second_query = tl.split(query.reshape(BLOCK_M, HEAD_PAD // 2, 2))
    else:
        second_query = query
    return query, second_query, scale


@triton.jit
def query_by_keys(query, second_query, keys, PAIRED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLES: tl.constexpr):
    """Products [BLOCK_M, BLOCK_N] of a row's heads with a tile of keys."""
    if PAIRED:
        keys, second_keys = of_pairs(keys, ASSEMBLES)
        products = tl.dot(query, keys.to(query.dtype), input_precision=PRECISION)
        products = tl.dot(second_query, second_keys.to(query.dtype), products, input_precision=PRECISION)
    else:
        products = tl.dot(query, converted(keys, query.dtype), input_precision=PRECISION)
    return products


@triton.jit
def add_values(
    acc, second_acc, alpha, weights, values,
    PAIRED: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLES: tl.constexpr,
):  # fmt: skip
    """acc * alpha + weights @ values, [BLOCK_M, VALUE_PAD]; PAIRED: of the first and of the second elements of each pair."""
    acc = acc * alpha[:, None]
    if PAIRED:
        values, second_values = of_pairs(values, ASSEMBLES)
        second_acc = second_acc * alpha[:, None]
        second_acc = tl.dot(weights, second_values.to(weights.dtype), second_acc, input_precision=PRECISION)
    acc = tl.dot(weights, converted(values, weights.dtype), acc, input_precision=PRECISION)
    return acc, second_acc


@triton.jit
def decode_kernel(
    out_ptr,
    acc_ptr,
    m_ptr,
    l_ptr,
    arrivals_ptr,
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
    BLOCK_N: tl.constexpr,
    SUM_LATE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    ASSEMBLES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    row, sequence, position, live = locate(tl.program_id(0), query_start_ptr, seq_lens_ptr, num_seqs, BY_TOKEN)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + member
    grouped = member < GROUP
    value_column = tl.arange(0, VALUE_PAD)
    # 8-bit blocks are read in pairs of neighbours: 16 bits are the least that the tensor cores' operands are loaded
    # in from shared memory. First and second elements are then operands of two products of half the columns.
    PAIRED: tl.constexpr = key_cache_ptr.dtype.element_ty == tl.int16
    WIDTH: tl.constexpr = 2 if PAIRED else 1
    key_unit = tl.arange(0, HEAD_PAD // WIDTH)
    value_unit = tl.arange(0, VALUE_PAD // WIDTH)
    row = row.to(tl.int64)
    out_at = out_ptr + (row * KV_HEADS * GROUP + head[:, None]) * VALUE_SIZE + value_column[None, :]
    out_mask = grouped[:, None] & (value_column < VALUE_SIZE)[None, :]
    if not live:
        if BY_TOKEN and split == 0:
            tl.store(out_at, tl.zeros([BLOCK_M, VALUE_PAD], out_ptr.dtype.element_ty), mask=out_mask)
        return
    begin = first_key(position, WINDOW, CHUNK)
    length = position + 1 - begin
    span = split_span(length, NUM_SPLITS, BLOCK_N, MIN_SPLIT)
    if NUM_SPLITS == 1:
        span = length
    end = tl.minimum(begin + (split + 1) * span, position + 1)
    begin += split * span
    if begin >= end:
        return

    query, second_query, scale = load_query(
        query_ptr + row * query_token_stride,
        head, grouped, scale, query_head_stride, HEAD_SIZE, HEAD_PAD, BLOCK_M, PAIRED,
    )  # fmt: skip
    # The first split counts the sink.
    m_i, l_i = first_sums(sinks_ptr, head, grouped & (split == 0), BLOCK_M, HAS_SINKS)
    if SUM_LATE:
        l_i = tl.where(tl.arange(0, BLOCK_N)[None, :] == 0, l_i[:, None], 0.0)
    acc = tl.zeros([BLOCK_M, VALUE_PAD // WIDTH], tl.float32)
    second_acc = acc

    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    lane = tl.arange(0, BLOCK_N)
    # The next tile's block ids are carried: a load of them inside the loop, which the loads of keys and values
    # depend on, would take half of the pipeline's buffers.
    block = tl.load(table_ptr + (begin + lane) // BLOCK_SIZE, mask=begin + lane < end, other=0)
    for start in range(begin, end, BLOCK_N):
        token = start + lane
        inside = token < end
        slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        block = tl.load(table_ptr + (token + BLOCK_N) // BLOCK_SIZE, mask=token + BLOCK_N < end, other=0)
        keys = load_tile(
            key_cache_ptr, slot[None, :], inside[None, :], kv_head, key_unit[:, None], KV_HEADS, HEAD_SIZE // WIDTH
        )
        values = load_tile(
            value_cache_ptr, slot[:, None], inside[:, None], kv_head, value_unit[None, :], KV_HEADS, VALUE_SIZE // WIDTH
        )
        products = query_by_keys(query, second_query, keys, PAIRED, PRECISION, ASSEMBLES)
        logits = tl.where(inside[None, :], to_base2(products, scale, SOFTCAP), float("-inf"))
        weights, m_i, l_i, alpha = update(logits, m_i, l_i, SUM_LATE)
        acc, second_acc = add_values(
            acc, second_acc, alpha, weights.to(query.dtype), values, PAIRED, PRECISION, ASSEMBLES
        )

    if SUM_LATE:
        l_i = tl.sum(l_i, 1)
    if PAIRED:
        acc = tl.interleave(acc, second_acc)
    if NUM_SPLITS == 1:
        tl.store(out_at, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=out_mask)
        return
    # What each split found is stored at [row, split, head].
    used = (length + span - 1) // span
    arrival_ptr = arrivals_ptr + (tl.program_id(0) * KV_HEADS + kv_head)
    first = tl.program_id(0).to(tl.int64) * NUM_SPLITS * KV_HEADS * GROUP + head
    mine = first + split * KV_HEADS * GROUP
    before = store_split(
        acc, m_i, l_i, acc_ptr, m_ptr, l_ptr, mine, value_column, grouped, out_mask, arrival_ptr, VALUE_SIZE
    )
    if before < used - 1:
        return
    tl.store(arrival_ptr, 0)
    acc, l_i = merge_splits(
        acc_ptr, m_ptr, l_ptr, first, value_column, grouped, out_mask, used,
        KV_HEADS * GROUP, VALUE_SIZE, BLOCK_M, VALUE_PAD,
    )  # fmt: skip
    tl.store(out_at, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=out_mask)


def num_splits(rows: int, kv_heads: int, max_length: int, programs: int) -> int:
    """Splits a row is given, from sizes alone: `programs` altogether or more, a power of two."""
    wanted = max(-(-programs // (rows * kv_heads)), -(-max_length // MAX_SPLIT))
    useful = -(-max_length // MIN_SPLIT)
    return min(int(triton.next_power_of_2(min(wanted, useful))), MAX_SPLITS)


def by_token(tokens: int, num_seqs: int) -> bool:
    """Whether the kernel computes every row of a step of these sizes: there is a row a sequence at most."""
    return tokens <= num_seqs


class LaunchShape(NamedTuple):
    """How a step is shared out: the tile, the padded head sizes and the splits of a row."""

    tile: Tile
    head_pad: int
    value_pad: int
    splits: int


def launch_shape(query: Tensor, key_cache: Tensor, value_cache: Tensor, rows: int, max_length: int) -> LaunchShape:
    """How `rows` rows of query [T, Hq, D] over blocks [blocks, block_size, Hkv, D] are shared out, from sizes alone."""
    kv_heads, value_size = value_cache.shape[2:]
    width = key_cache.element_size()
    smallest = 32 if width == 1 else 16
    head_pad = max(smallest, triton.next_power_of_2(query.shape[2]))
    value_pad = max(smallest, triton.next_power_of_2(value_size))
    tile = measured(TILES, query.device)[4 if query.element_size() == 4 else width, max(head_pad, value_pad)]
    return LaunchShape(tile, head_pad, value_pad, num_splits(rows, kv_heads, max_length, tile.programs))


def partial_results(query: Tensor, rows: int, kv_heads: int, value_size: int, splits: int) -> tuple[Tensor, ...]:
    """Where splits leave what they found: acc [rows, splits, Hq, Dv], m_i and l_i [rows, splits, Hq], and the arrival counts.

    Empty for one split, which writes the output. Raises ValueError if more rows are split than there are counts.
    """
    shape = (rows, splits if splits > 1 else 0, query.shape[1])
    arrivals = arrival_counts(query.device)
    if splits > 1 and rows * kv_heads > len(arrivals):
        raise ValueError(f"{rows} rows of {kv_heads} heads are split: more than {len(arrivals)} counts")
    acc = torch.empty(*shape, value_size, dtype=torch.float32, device=query.device)
    m_i, l_i = torch.empty(2, *shape, dtype=torch.float32, device=query.device)
    return acc, m_i, l_i, arrivals


def attend_rows(
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
    """Write rows of out [T, Hq, Dv]: all of them if `by_token`, else those of the sequences with one row."""
    block_size, kv_heads, value_size = value_cache.shape[1:]
    group = query.shape[1] // kv_heads
    num_seqs, max_blocks = block_tables.shape
    every_row = by_token(query.shape[0], num_seqs)
    rows = query.shape[0] if every_row else num_seqs
    tile, head_pad, value_pad, splits = launch_shape(query, key_cache, value_cache, rows, max_blocks * block_size)
    if key_cache.element_size() == 1:
        key_cache, value_cache = key_cache.view(torch.int16), value_cache.view(torch.int16)
    decode_kernel[rows, kv_heads, splits](
        out,
        *partial_results(query, rows, kv_heads, value_size, splits),
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        seq_lens,
        sinks if sinks is not None else query,
        scale if softcap else scale * LOG2E,
        num_seqs,
        *query.stride()[:2],
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_SIZE=query.shape[2],
        VALUE_SIZE=value_size,
        HEAD_PAD=head_pad,
        VALUE_PAD=value_pad,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tile.block_n,
        SUM_LATE=tile.sum_late,
        NUM_SPLITS=splits,
        MIN_SPLIT=MIN_SPLIT,
        WINDOW=window,
        CHUNK=chunk,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        PRECISION=dot_precision(max(head_pad, value_pad)),
        BY_TOKEN=every_row,
        ASSEMBLES=query.device.type != "cpu",  # the interpreter knows no inline assembly
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(query.device),
    )
