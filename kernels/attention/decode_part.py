"""Triton device functions: attention of a unit's rows to some of its tiles of keys, and the merging of such parts.

Knows blocks and queries; which part a program takes is `shares.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagegraph.kernels.attention.shares import seen
from pagegraph.kernels.attention.softmax import converted, first_key, levelled, of_pairs, to_base2, update


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
def store_part(acc, m_i, l_i, acc_ptr, m_ptr, l_ptr, at, column, in_m, mask, arrival_ptr, VALUE_SIZE: tl.constexpr):
    """Store what a part of a unit found at `at` [BLOCK_M] -> how many parts of the unit have been stored before."""
    tl.store(m_ptr + at, m_i, mask=in_m)
    tl.store(l_ptr + at, l_i, mask=in_m)
    tl.store(acc_ptr + at[:, None] * VALUE_SIZE + column[None, :], acc, mask=mask)
    tl.debug_barrier()  # every thread's share is stored before the arrival is counted
    return tl.atomic_add(arrival_ptr, 1, sem="acq_rel")


@triton.jit
def load_part(acc_ptr, m_ptr, l_ptr, at, column, in_m, mask, VALUE_SIZE: tl.constexpr):
    """What `store_part` stored, nothing found where masked; past the first-level cache, which does not see what other programs store."""
    m_there = tl.load(m_ptr + at, mask=in_m, other=float("-inf"), cache_modifier=".cg")
    l_there = tl.load(l_ptr + at, mask=in_m, other=0.0, cache_modifier=".cg")
    acc_there = tl.load(
        acc_ptr + at[:, None] * VALUE_SIZE + column[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    return m_there, l_there, acc_there


@triton.jit
def merge_parts(
    acc_ptr, m_ptr, l_ptr, first, count, lane, column, in_m, mask,
    VALUE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, VALUE_PAD: tl.constexpr, AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, VALUE_PAD] and l_i [BLOCK_M] of a unit whose `count` parts lie with programs from `first` on, in order."""
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    for base in range(0, count, AT_A_TIME):
        parts = ()
        for ahead in tl.static_range(AT_A_TIME):  # asked for together
            part = base + ahead
            at = ((first + part) * 2 + (part == 0).to(tl.int32)) * BLOCK_M + lane
            there = part < count
            parts = parts + (load_part(acc_ptr, m_ptr, l_ptr, at, column, in_m & there, mask & there, VALUE_SIZE),)
        for ahead in tl.static_range(AT_A_TIME):
            m_there, l_there, acc_there = parts[ahead]
            m_new = tl.maximum(m_i, m_there)
            anchor = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen no key yet: no inf - inf
            keep, take = tl.exp2(m_i - anchor), tl.exp2(m_there - anchor)
            l_i = l_i * keep + l_there * take
            acc = acc * keep[:, None] + acc_there * take[:, None]
            m_i = m_new
    return acc, l_i


@triton.jit
def load_query(
    query_at, in_m, scale, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """A unit's queries [BLOCK_M, HEAD_PAD], at query_at [BLOCK_M] -> (operand, second operand, scale of their products with keys).

    PAIRED: the operands are the first and the second elements of each pair, float16, and the scale is [BLOCK_M, 1].
    """
    column = tl.arange(0, HEAD_PAD)
    query = tl.load(
        query_at[:, None] + column[None, :],
        mask=in_m[:, None] & (column < HEAD_SIZE)[None, :],
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
    """Products [BLOCK_M, BLOCK_N] of a unit's queries with a tile of keys."""
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
def attend_part(
    part, memory, scale, strides,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_LATE: tl.constexpr, MERGED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLES: tl.constexpr,
):  # fmt: skip
    """Attend to tiles `tile` to `through` of a unit's `each`; write its rows of the output if nothing of it is missing then.

    part: (sequence, its first row of the step, its rows, its length, KV head, the unit's first row of the sequence's,
    tile, through, each, parts of the unit, the program that has the first).
    """
    sequence, row_begin, rows, length, kv_head, first_row, tile, through, each, parts, first = part
    (
        out_ptr,
        acc_ptr,
        m_ptr,
        l_ptr,
        arrivals_ptr,
        query_ptr,
        key_cache_ptr,
        value_cache_ptr,
        block_tables_ptr,
        sinks_ptr,
    ) = memory
    query_token_stride, query_head_stride, table_stride = strides
    # 8-bit blocks are read in pairs of neighbours: 16 bits are the least that the tensor cores' operands are loaded
    # in from shared memory. First and second elements are then operands of two products of half the columns.
    PAIRED: tl.constexpr = key_cache_ptr.dtype.element_ty == tl.int16
    WIDTH: tl.constexpr = 2 if PAIRED else 1
    value_column = tl.arange(0, VALUE_PAD)
    key_unit = tl.arange(0, HEAD_PAD // WIDTH)
    value_unit = tl.arange(0, VALUE_PAD // WIDTH)
    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane // GROUP
    in_m = (lane < PACK * GROUP) & (row < rows)
    position = tl.where(in_m, length - rows + row, -1)
    head = kv_head * GROUP + lane % GROUP
    row = (row_begin + row).to(tl.int64)
    out_mask = in_m[:, None] & (value_column < VALUE_SIZE)[None, :]
    origin = first_key(length - rows + first_row, WINDOW, CHUNK)
    begin = origin + tile * BLOCK_N
    end = tl.minimum(origin + through * BLOCK_N, length - rows + tl.minimum(first_row + PACK, rows))

    query, second_query, scale = load_query(
        query_ptr + row * query_token_stride + head * query_head_stride,
        in_m, scale, HEAD_SIZE, HEAD_PAD, BLOCK_M, PAIRED,
    )  # fmt: skip
    # The first part counts the sink.
    m_i, l_i = first_sums(sinks_ptr, head, in_m & (tile == 0), BLOCK_M, HAS_SINKS)
    if SUM_LATE:
        l_i = tl.where(tl.arange(0, BLOCK_N)[None, :] == 0, l_i[:, None], 0.0)
    acc = tl.zeros([BLOCK_M, VALUE_PAD // WIDTH], tl.float32)
    second_acc = acc

    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    key_lane = tl.arange(0, BLOCK_N)
    # The next tile's block ids are carried: a load of them inside the loop, which the loads of keys and values
    # depend on, would take half of the pipeline's buffers.
    block = tl.load(table_ptr + (begin + key_lane) // BLOCK_SIZE, mask=begin + key_lane < end, other=0)
    for start in range(begin, end, BLOCK_N):
        token = start + key_lane
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
        visible = seen(token, inside, position, PACK, WINDOW, CHUNK)
        logits = tl.where(visible, to_base2(products, scale, SOFTCAP), float("-inf"))
        weights, m_i, l_i, alpha = update(logits, m_i, l_i, SUM_LATE)
        acc, second_acc = add_values(
            acc, second_acc, alpha, weights.to(query.dtype), values, PAIRED, PRECISION, ASSEMBLES
        )

    if SUM_LATE:
        l_i = tl.sum(l_i, 1)
    if PAIRED:
        acc = tl.interleave(acc, second_acc)
    last = True
    if through - tile < each:
        mine = (tl.program_id(0) * 2 + (tile == 0).to(tl.int32)) * BLOCK_M + lane
        before = store_part(
            acc, m_i, l_i, acc_ptr, m_ptr, l_ptr, mine, value_column, in_m, out_mask, arrivals_ptr + first, VALUE_SIZE
        )
        last = before == parts - 1
        if last:
            tl.store(arrivals_ptr + first, 0)
            acc, l_i = merge_parts(
                acc_ptr,
                m_ptr,
                l_ptr,
                first,
                parts,
                lane,
                value_column,
                in_m,
                out_mask,
                VALUE_SIZE,
                BLOCK_M,
                VALUE_PAD,
                MERGED,
            )
    if last:
        out_at = out_ptr + (row[:, None] * KV_HEADS * GROUP + head[:, None]) * VALUE_SIZE + value_column[None, :]
        tl.store(out_at, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=out_mask)
