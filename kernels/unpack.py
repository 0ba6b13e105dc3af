"""Triton: what a step brought becomes what the model reads: ids, positions, slots and block tables.

Two kernels at the head of every step. The first brings the block tables up to date and, where the same packet is read
again, moves every sequence on by a token; the second looks up. Knows no host and no model. See `kernels.ops`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, wait

BLOCK = 128
UPDATE_PROGRAMS = 8
NUM_WARPS = 4


# Sizes vary from step to step: one compiled kernel serves them all.
@triton.jit(do_not_specialize=["num_seqs"])
def update_tables_kernel(
    tables_ptr,
    pages_ptr,
    num_pages_ptr,
    starts_ptr,
    age_ptr,
    num_seqs,
    table_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(0) * BLOCK
    num_pages = tl.load(num_pages_ptr)
    for begin in range(0, num_pages, step):
        entry = begin + first
        inside = entry < num_pages
        row = tl.load(pages_ptr + 3 * entry, mask=inside, other=0)
        index = tl.load(pages_ptr + 3 * entry + 1, mask=inside, other=0)
        page = tl.load(pages_ptr + 3 * entry + 2, mask=inside, other=0)
        tl.store(tables_ptr + row.to(tl.int64) * table_stride + index, page, mask=inside)
    for begin in range(0, num_seqs, step):
        sequence = begin + first
        inside = sequence < num_seqs
        age = tl.load(age_ptr + sequence, mask=inside, other=0)
        start = tl.load(starts_ptr + sequence, mask=inside, other=0)
        tl.store(starts_ptr + sequence, start + tl.maximum(age, 0), mask=inside)
        tl.store(age_ptr + sequence, tl.minimum(age + 1, 1), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "token_programs"])
def unpack_kernel(
    ids_ptr,
    positions_ptr,
    slots_ptr,
    out_tables_ptr,
    seq_lens_ptr,
    logits_index_ptr,
    token_ids_ptr,
    rows_ptr,
    query_start_ptr,
    starts_ptr,
    last_tokens_ptr,
    tables_ptr,
    num_tokens,
    num_seqs,
    token_programs,
    table_stride,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if program < token_programs:
        token = program * BLOCK + lane
        inside = token < num_tokens
        live = token < tl.load(query_start_ptr + num_seqs)
        # Which sequence a token is of: the last that starts at or before it.
        low = tl.zeros([BLOCK], tl.int32)
        high = tl.zeros([BLOCK], tl.int32) + num_seqs
        while tl.max(high - low, 0) > 1:
            middle = (low + high) // 2
            before = tl.load(query_start_ptr + middle) <= token
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        row = tl.load(rows_ptr + low).to(tl.int64)
        position = tl.load(starts_ptr + low) + token - tl.load(query_start_ptr + low)
        given = tl.load(token_ids_ptr + token, mask=inside, other=0)
        last = tl.load(last_tokens_ptr + row)
        page = tl.load(tables_ptr + row * table_stride + position // BLOCK_SIZE, mask=live, other=0)
        tl.store(ids_ptr + token, tl.where(live, tl.where(given < 0, last, given), 0), mask=inside)
        tl.store(positions_ptr + token, tl.where(live, position, 0), mask=inside)
        tl.store(slots_ptr + token, tl.where(live, page * BLOCK_SIZE + position % BLOCK_SIZE, 0), mask=inside)
    else:
        sequence = program - token_programs
        begin = tl.load(query_start_ptr + sequence)
        end = tl.load(query_start_ptr + sequence + 1)
        # Padding has no tokens, and so no keys.
        length = tl.where(end > begin, tl.load(starts_ptr + sequence) + end - begin, 0)
        tl.store(seq_lens_ptr + sequence, length)
        tl.store(logits_index_ptr + sequence, tl.maximum(end - 1, 0).to(tl.int64))
        table = tables_ptr + tl.load(rows_ptr + sequence).to(tl.int64) * table_stride
        out = out_tables_ptr + sequence.to(tl.int64) * WIDTH
        used = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
        for first in range(0, WIDTH, BLOCK):
            index = first + lane
            tl.store(out + index, tl.load(table + index, mask=index < used, other=0), mask=index < WIDTH)


def update_tables(tables: Tensor, pages: Tensor, num_pages: Tensor, starts: Tensor, age: Tensor) -> None:
    """See `kernels.ops`."""
    update_tables_kernel[(UPDATE_PROGRAMS,)](
        tables,
        pages,
        num_pages,
        starts,
        age,
        len(starts),
        tables.stride(0),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **dependent(tables.device),
    )


def unpack(
    token_ids: Tensor,
    rows: Tensor,
    query_start: Tensor,
    starts: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    block_size: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.ops`."""
    tokens, seqs = len(token_ids), len(rows)
    ids, positions, slots = (torch.empty_like(token_ids) for _ in range(3))
    out_tables = torch.empty(seqs, width, dtype=torch.int32, device=rows.device)
    seq_lens = torch.empty_like(rows)
    logits_index = torch.empty(seqs, dtype=torch.int64, device=rows.device)
    token_programs = triton.cdiv(tokens, BLOCK)
    unpack_kernel[(token_programs + seqs,)](
        ids,
        positions,
        slots,
        out_tables,
        seq_lens,
        logits_index,
        token_ids,
        rows,
        query_start,
        starts,
        last_tokens,
        tables,
        tokens,
        seqs,
        token_programs,
        tables.stride(0),
        WIDTH=width,
        BLOCK_SIZE=block_size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **dependent(tables.device),
    )
    return ids, positions, slots, out_tables, seq_lens, logits_index
