"""Triton: what a step brought becomes what the model reads: ids, positions, slot_mapping and block tables.

Two kernels at the head of every step. The first brings the block tables up to date; the second looks up, also where a
slot stands of which the host does not know yet. Knows no host and no model. See `kernels.ops`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

BLOCK = 128
UPDATE_PROGRAMS = 8
NUM_WARPS = 4


# Sizes vary from step to step: one compiled kernel serves them all.
@triton.jit
def update_tables_kernel(
    tables_ptr,
    new_blocks_ptr,
    num_new_blocks_ptr,
    table_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(0) * BLOCK
    num_new_blocks = tl.load(num_new_blocks_ptr)
    for begin in range(0, num_new_blocks, step):
        new = begin + first
        inside = new < num_new_blocks
        slot = tl.load(new_blocks_ptr + 3 * new, mask=inside, other=0)
        index = tl.load(new_blocks_ptr + 3 * new + 1, mask=inside, other=0)
        block = tl.load(new_blocks_ptr + 3 * new + 2, mask=inside, other=0)
        tl.store(tables_ptr + slot.to(tl.int64) * table_stride + index, block, mask=inside)


@triton.jit
def _start(token_ids_ptr, starts_ptr, last_at_ptr, sequence, begin, slot, live):
    """The position of a sequence's first token: as given, or as far behind the slot's last token as its id says."""
    first = tl.load(token_ids_ptr + begin, mask=live, other=0)
    behind_last = tl.load(last_at_ptr + slot) - 1 - first
    return tl.where(first < 0, behind_last, tl.load(starts_ptr + sequence))


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "token_programs", "draft_stride"])
def unpack_kernel(
    ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    out_tables_ptr,
    seq_lens_ptr,
    logits_index_ptr,
    token_ids_ptr,
    slots_ptr,
    query_start_ptr,
    starts_ptr,
    last_tokens_ptr,
    last_at_ptr,
    draft_tokens_ptr,
    tables_ptr,
    num_tokens,
    num_seqs,
    token_programs,
    draft_stride,
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
        slot = tl.load(slots_ptr + low).to(tl.int64)
        first = tl.load(query_start_ptr + low)
        position = _start(token_ids_ptr, starts_ptr, last_at_ptr, low, first, slot, live) + token - first
        given = tl.load(token_ids_ptr + token, mask=inside, other=0)
        last = tl.load(last_tokens_ptr + slot)
        draft = tl.load(draft_tokens_ptr + slot * draft_stride - given - 2, mask=live & (given < -1), other=0)
        known = tl.where(given == -1, last, tl.where(given < -1, draft, given))
        block = tl.load(tables_ptr + slot * table_stride + position // BLOCK_SIZE, mask=live, other=0)
        tl.store(ids_ptr + token, tl.where(live, known, 0), mask=inside)
        tl.store(positions_ptr + token, tl.where(live, position, 0), mask=inside)
        tl.store(slot_mapping_ptr + token, tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, 0), mask=inside)
    else:
        sequence = program - token_programs
        begin = tl.load(query_start_ptr + sequence)
        end = tl.load(query_start_ptr + sequence + 1)
        owner = tl.load(slots_ptr + sequence).to(tl.int64)
        start = _start(token_ids_ptr, starts_ptr, last_at_ptr, sequence, begin, owner, end > begin)
        length = tl.where(end > begin, start + end - begin, 0)  # padding has no tokens, and so no keys
        tl.store(seq_lens_ptr + sequence, length)
        tl.store(logits_index_ptr + sequence, tl.maximum(end - 1, 0).to(tl.int64))
        table = tables_ptr + owner * table_stride
        out = out_tables_ptr + sequence.to(tl.int64) * WIDTH
        used = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
        for base in range(0, WIDTH, BLOCK):
            index = base + lane
            tl.store(out + index, tl.load(table + index, mask=index < used, other=0), mask=index < WIDTH)


def update_tables(tables: Tensor, new_blocks: Tensor, num_new_blocks: Tensor) -> None:
    """See `kernels.ops`."""
    update_tables_kernel[(UPDATE_PROGRAMS,)](
        tables,
        new_blocks,
        num_new_blocks,
        tables.stride(0),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **dependent(tables.device),
    )


def unpack(
    token_ids: Tensor,
    slots: Tensor,
    query_start: Tensor,
    starts: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
    draft_tokens: Tensor,
    tables: Tensor,
    block_size: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.ops`."""
    tokens, seqs = len(token_ids), len(slots)
    ids, positions, slot_mapping = (torch.empty_like(token_ids) for _ in range(3))
    out_tables = torch.empty(seqs, width, dtype=torch.int32, device=slots.device)
    seq_lens = torch.empty_like(slots)
    logits_index = torch.empty(seqs, dtype=torch.int64, device=slots.device)
    token_programs = triton.cdiv(tokens, BLOCK)
    unpack_kernel[(token_programs + seqs,)](
        ids,
        positions,
        slot_mapping,
        out_tables,
        seq_lens,
        logits_index,
        token_ids,
        slots,
        query_start,
        starts,
        last_tokens,
        last_at,
        draft_tokens,
        tables,
        tokens,
        seqs,
        token_programs,
        draft_tokens.stride(0),
        tables.stride(0),
        WIDTH=width,
        BLOCK_SIZE=block_size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **dependent(tables.device),
    )
    return ids, positions, slot_mapping, out_tables, seq_lens, logits_index
