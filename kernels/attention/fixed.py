"""Triton: paged attention of any rows in which a row gives the same bits whatever else the step has.

One tile of rows for prompts and single tokens alike, tiles of keys whose places count from the sequence's first key, and
sections of keys (`sections.py`), each added up by itself and then folded in order. A program folds the sections of its rows as
it comes to them; where there are few rows, programs share the sections out, leave what each found, and the last to arrive
folds them. Sums are written with fused multiply-adds, so that all ways round alike. Tiles of keys that every row sees skip the
mask, which changes nothing there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.attention.prefill import masked, rows_of, slot_of
from pagegraph.kernels.attention.shares import zero_padding
from pagegraph.kernels.attention.softmax import (
    LOG2E,
    converted,
    dot_precision,
    first_key,
    last_not_above,
    to_base2,
)
from pagegraph.kernels.pdl import arrival_counts, dependent, wait

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


@triton.jit
def _sequence_of(query_start_ptr, tile, num_seqs, BLOCK_Q: tl.constexpr):
    expected = tl.minimum(tile - tile // (BLOCK_Q + 1), num_seqs - 1)  # right where every sequence has one row
    begin, behind = tl.load(query_start_ptr + expected), tl.load(query_start_ptr + expected + 1)
    found = expected
    if (begin // BLOCK_Q + expected > tile) | (behind // BLOCK_Q + expected + 1 <= tile):
        found = last_not_above(query_start_ptr, tile, num_seqs, tile, BLOCK_Q)
    return found


@triton.jit(do_not_specialize=["num_seqs", "num_rows"])
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
    num_rows,
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
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    index = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    # Late tiles see the most keys: they start first, all heads of one together.
    tile = tl.num_programs(0) // (KV_HEADS * SPLITS) - 1 - index // KV_HEADS
    kv_head = index % KV_HEADS
    if PDL:
        wait()
    zero_padding(out_ptr, query_start_ptr, num_seqs, num_rows, KV_HEADS * GROUP * VALUE_SIZE)
    sequence = _sequence_of(query_start_ptr, tile, num_seqs, BLOCK_Q)
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
    key_ptr, value_ptr = key_cache_ptr + kv_head * HEAD_SIZE, value_cache_ptr + kv_head * VALUE_SIZE
    key_lane = tl.arange(0, BLOCK_N)
    lowest = offset + first
    end = offset + tl.minimum(first + BLOCK_Q, count)
    last = (end - 1).to(tl.uint32)  # lanes past it read it: a weight of 0 must not meet what an unused slot holds
    seen_from = first_key(lowest, WINDOW, CHUNK) // BLOCK_N * BLOCK_N
    first_section, behind = seen_from // SECTION, (end + SECTION - 1) // SECTION
    share = (behind - first_section + SPLITS - 1) // SPLITS
    mine = first_section + split * share
    if mine >= behind:
        return
    begin = tl.maximum(mine * SECTION, seen_from)
    stop = tl.minimum((mine + share) * SECTION, end)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    if HAS_SINKS:
        m_i = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        l_i = l_i + 1.0
    out_mask = live[:, None] & (value_column < VALUE_SIZE)[None, :]
    part_row = (row * (KV_HEADS * GROUP) + head) * SECTIONS
    m_here = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_here = tl.zeros([BLOCK_M], tl.float32)
    acc_here = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    block = tl.load(table_ptr + tl.minimum((begin + key_lane).to(tl.uint32), last) // BLOCK_SIZE)
    for start in range(begin, stop, BLOCK_N):  # one loop for all sections: loads run ahead across their borders
        if (start % SECTION == 0) & (start > begin):
            if SPLITS > 1:
                at = part_row + start // SECTION - 1
                tl.store(m_ptr + at, m_here, mask=live)
                tl.store(l_ptr + at, l_here, mask=live)
                tl.store(acc_ptr + at[:, None] * VALUE_SIZE + value_column[None, :], acc_here, mask=out_mask)
            else:
                acc, m_i, l_i = _fold(acc, m_i, l_i, acc_here, m_here, l_here)
            m_here = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l_here = tl.zeros([BLOCK_M], tl.float32)
            acc_here = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
        slot = slot_of(block, tl.minimum((start + key_lane).to(tl.uint32), last), BLOCK_SIZE, WIDE)
        # Block ids are carried one tile ahead, as in the prefill kernel.
        block = tl.load(table_ptr + tl.minimum((start + BLOCK_N + key_lane).to(tl.uint32), last) // BLOCK_SIZE)
        keys = converted(rows_of(key_ptr, slot, KV_HEADS * HEAD_SIZE, HEAD_SIZE, HEAD_PAD), query.dtype)
        values = converted(rows_of(value_ptr, slot, KV_HEADS * VALUE_SIZE, VALUE_SIZE, VALUE_PAD), query.dtype)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if SOFTCAP > 0:
            logits = to_base2(logits, scale, SOFTCAP)
        if (WINDOW > 0) or (CHUNK > 0):
            logits = masked(logits, position, start, BLOCK_N, WINDOW, CHUNK)
        elif start + BLOCK_N > lowest + 1:
            logits = masked(logits, position, start, BLOCK_N, WINDOW, CHUNK)
        factor = 1.0 if SOFTCAP > 0 else scale
        m_new = tl.maximum(m_here, tl.max(logits, 1) * factor)
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_here - anchor)
        weights = tl.exp2(
            tl.fma(logits, tl.full(logits.shape, factor, tl.float32), tl.broadcast_to(-anchor[:, None], logits.shape))
        )
        l_here = tl.fma(l_here, alpha, tl.sum(weights, 1))
        acc_here = tl.dot(weights.to(query.dtype), values, acc_here * alpha[:, None], input_precision=PRECISION)
        m_here = m_new
    if (SPLITS == 1) | (behind - first_section == 1):
        acc, m_i, l_i = _fold(acc, m_i, l_i, acc_here, m_here, l_here)
    else:
        at = part_row + (stop - 1) // SECTION
        tl.store(m_ptr + at, m_here, mask=live)
        tl.store(l_ptr + at, l_here, mask=live)
        tl.store(acc_ptr + at[:, None] * VALUE_SIZE + value_column[None, :], acc_here, mask=out_mask)
        tl.debug_barrier()  # every thread's share is stored before the arrival is counted
        shares = (behind - first_section + share - 1) // share
        if tl.atomic_add(arrivals_ptr + index, 1, sem="acq_rel") < shares - 1:
            return
        tl.store(arrivals_ptr + index, 0)
        for section in tl.range(first_section, behind, num_stages=1):
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
    narrow = query.element_size() * max(head_pad, value_pad) <= 256  # two programs of four warps fit a multiprocessor
    sections = -(-block_tables.shape[1] * block_size // section)
    splits = 1
    if tokens <= FEW_ROWS:
        splits = int(triton.next_power_of_2(max(1, min(PROGRAMS // programs, sections))))
    parts = tokens * heads * sections if splits > 1 else 0
    acc = torch.empty(parts, value_size, dtype=torch.float32, device=query.device)
    m_i, l_i = torch.empty(2, parts, dtype=torch.float32, device=query.device)
    out = torch.empty(tokens, heads, value_size, dtype=query.dtype, device=query.device)
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
        tokens,
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
        WIDE=max(key_cache.numel(), value_cache.numel()) >= 2**31,
        PRECISION=dot_precision(2 * max(head_pad, value_pad)),
        num_warps=4 if narrow else 8,
        num_stages=3 if narrow else 2,
        **dependent(query.device),
    )
    return out
