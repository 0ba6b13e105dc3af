"""Triton: paged attention of any rows in which a row gives the same bits whatever else the step has.

One tile of rows for prompts and single tokens alike, tiles of keys whose places count from the sequence's first key, and
sections of keys (`sections.py`), each added up by itself and then folded in order. A program folds the sections of its rows as
it comes to them; where there are few rows, programs share the sections out, leave what each found, and the last to arrive
folds them. What is folded is written with fused multiply-adds, so that both ways round alike.
"""

from __future__ import annotations

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
    to_base2,
)
from pagegraph.kernels.pdl import arrival_counts

BLOCK_M, BLOCK_N = 64, 64  # rows and heads; keys
PROGRAMS = 528
FEW_ROWS = 64  # whose sections may be shared out


@triton.jit
def _fold(acc, m_i, l_i, acc_there, m_there, l_there):
    m_new = tl.maximum(m_i, m_there)
    anchor = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen no key yet: no inf - inf
    keep, take = tl.exp2(m_i - anchor), tl.exp2(m_there - anchor)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), acc_there * take[:, None])
    return acc, m_new, tl.fma(l_i, keep, l_there * take)


@triton.jit(do_not_specialize=["num_seqs"])
def fixed_attention_kernel(
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
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SECTION: tl.constexpr,
    SECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    index = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    tile, kv_head = index // KV_HEADS, index % KV_HEADS
    sequence = last_not_above(query_start_ptr, tile, num_seqs, tile, BLOCK_Q)
    row_begin = tl.load(query_start_ptr + sequence)
    count = tl.load(query_start_ptr + sequence + 1) - row_begin
    first = (tile - (row_begin // BLOCK_Q + sequence)) * BLOCK_Q
    if first >= count:
        return
    lane = tl.arange(0, BLOCK_M)
    token = first + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    live = (lane < BLOCK_Q * GROUP) & (token < count)
    offset = tl.load(seq_lens_ptr + sequence) - count
    position = offset + token
    row = (row_begin + token).to(tl.int64)
    key_column, value_column = tl.arange(0, HEAD_PAD), tl.arange(0, VALUE_PAD)
    query = tl.load(
        query_ptr + row[:, None] * query_token_stride + head[:, None] * query_head_stride + key_column[None, :],
        mask=live[:, None] & (key_column < HEAD_SIZE)[None, :],
        other=0.0,
    )
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    begin = first_key(offset + first, WINDOW, CHUNK) // BLOCK_N * BLOCK_N
    end = offset + tl.minimum(first + BLOCK_Q, count)
    first_section, behind = begin // SECTION, (end + SECTION - 1) // SECTION
    share = (behind - first_section + SPLITS - 1) // SPLITS
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    if HAS_SINKS:
        m_i = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        l_i = l_i + 1.0
    out_mask = live[:, None] & (value_column < VALUE_SIZE)[None, :]
    part_row = (row * (KV_HEADS * GROUP) + head) * SECTIONS
    mine = first_section + split * share
    for section in range(mine, tl.minimum(mine + share, behind)):
        m_here = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_here = tl.zeros([BLOCK_M], tl.float32)
        acc_here = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
        for start in range(tl.maximum(section * SECTION, begin), tl.minimum((section + 1) * SECTION, end), BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            inside = key < end
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=inside, other=0)
            slot = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
            keys = tl.load(
                key_cache_ptr + slot[None, :] * HEAD_SIZE + key_column[:, None],
                mask=inside[None, :] & (key_column < HEAD_SIZE)[:, None],
                other=0.0,
            )
            values = tl.load(
                value_cache_ptr + slot[:, None] * VALUE_SIZE + value_column[None, :],
                mask=inside[:, None] & (value_column < VALUE_SIZE)[None, :],
                other=0.0,
            )
            products = tl.dot(query, converted(keys, query.dtype), input_precision=PRECISION)
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            if CHUNK > 0:
                seen = seen & (key[None, :] // CHUNK == position[:, None] // CHUNK)
            logits = tl.where(seen, to_base2(products, scale, SOFTCAP), float("-inf"))
            m_new = tl.maximum(m_here, tl.max(logits, 1))
            anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp2(m_here - anchor)
            weights = tl.exp2(logits - anchor[:, None])
            l_here = tl.fma(l_here, alpha, tl.sum(weights, 1))
            acc_here = tl.dot(
                weights.to(query.dtype),
                converted(values, query.dtype),
                acc_here * alpha[:, None],
                input_precision=PRECISION,
            )
            m_here = m_new
        if SPLITS > 1:
            at = part_row + section
            tl.store(m_ptr + at, m_here, mask=live)
            tl.store(l_ptr + at, l_here, mask=live)
            tl.store(acc_ptr + at[:, None] * VALUE_SIZE + value_column[None, :], acc_here, mask=out_mask)
        else:
            acc, m_i, l_i = _fold(acc, m_i, l_i, acc_here, m_here, l_here)
    if SPLITS > 1:
        tl.debug_barrier()  # every thread's share is stored before the arrival is counted
        if tl.atomic_add(arrivals_ptr + index, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(arrivals_ptr + index, 0)
        for section in range(first_section, behind):
            at = part_row + section
            m_there = tl.load(m_ptr + at, mask=live, other=float("-inf"), cache_modifier=".cg")
            l_there = tl.load(l_ptr + at, mask=live, other=0.0, cache_modifier=".cg")
            acc_there = tl.load(
                acc_ptr + at[:, None] * VALUE_SIZE + value_column[None, :],
                mask=out_mask,
                other=0.0,
                cache_modifier=".cg",
            )
            acc, m_i, l_i = _fold(acc, m_i, l_i, acc_there, m_there, l_there)
    tl.store(
        out_ptr + (row[:, None] * KV_HEADS * GROUP + head[:, None]) * VALUE_SIZE + value_column[None, :],
        (acc / l_i[:, None]).to(out_ptr.dtype.element_ty),
        mask=out_mask,
    )


def attend_fixed(
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
    section: int,
) -> Tensor:
    """Attention of query [T, Hq, D] over blocks that hold the step's own keys and values -> [T, Hq, Dv]; padding rows are 0."""
    tokens, heads, head_size = query.shape
    block_size, kv_heads, value_size = value_cache.shape[1:]
    group, num_seqs = heads // kv_heads, len(block_tables)
    block_m = max(BLOCK_M, triton.next_power_of_2(group))
    block_q = block_m // group
    head_pad, value_pad = max(16, triton.next_power_of_2(head_size)), max(16, triton.next_power_of_2(value_size))
    programs = (tokens // block_q + num_seqs) * kv_heads
    sections = -(-block_tables.shape[1] * block_size // section)
    splits = 1
    if tokens <= FEW_ROWS:
        splits = int(triton.next_power_of_2(max(1, min(PROGRAMS // programs, sections))))
    parts = tokens * heads * sections if splits > 1 else 0
    acc = torch.empty(parts, value_size, dtype=torch.float32, device=query.device)
    m_i, l_i = torch.empty(2, parts, dtype=torch.float32, device=query.device)
    out = torch.zeros(tokens, heads, value_size, dtype=query.dtype, device=query.device)
    fixed_attention_kernel[(programs * splits,)](
        out,
        acc,
        m_i,
        l_i,
        arrival_counts(query.device),
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
        HEAD_SIZE=head_size,
        VALUE_SIZE=value_size,
        HEAD_PAD=head_pad,
        VALUE_PAD=value_pad,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=BLOCK_N if value_pad <= 128 else BLOCK_N // 2,
        SECTION=section,
        SECTIONS=sections,
        SPLITS=splits,
        WINDOW=window,
        CHUNK=chunk,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        PRECISION=dot_precision(2 * max(head_pad, value_pad)),
        num_warps=4 if value_pad < 128 else 8,
        num_stages=2,
    )
    return out
