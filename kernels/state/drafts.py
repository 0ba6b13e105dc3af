"""Triton: what kernels over recurrent state share about draft tokens: whose rows are which, and where rows put aside lie.

A slot's last known token and its draft tokens are queries of one row, side by side. The program of the first takes them all, in order:
those of draft tokens find nothing to do. It takes up what was accepted of the step before, then its own row, writes the state back, and
goes on with draft tokens on what it holds. Rows put aside lie by position, in a ring of 2K + 1: programs that share a row of the step
before read it while another writes one of this step, and K positions before a row and K behind it never meet. With no draft tokens
in an engine, RING is 0 and nothing of this is in the kernels. Knows no recurrence.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

BLOCK = 128  # queries of a program that counts


def draft_arguments(draft_rows: Tensor | None, state_lens: Tensor | None) -> dict[str, Any]:
    """What kernels take for the arguments of the ops; see `kernels.ops`."""
    if draft_rows is None:
        return dict(drafts_ptr=None, state_lens_ptr=None, num_draft_slots=0, RING=0, LANES=1)
    ring = draft_rows.shape[1]
    lanes = triton.next_power_of_2(ring // 2)
    return dict(
        drafts_ptr=draft_rows, state_lens_ptr=state_lens, num_draft_slots=draft_rows.shape[0], RING=ring, LANES=lanes
    )


@triton.jit
def group_at(
    sequence, slots_ptr, query_start_ptr, seq_lens_ptr, state_lens_ptr, num_seqs, num_draft_slots, RING: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Of a sequence: (its first row, the end of its own, the end of its draft tokens', its slot, tokens that it had before, how many
    of these are draft tokens that its state is without). It has no rows where another takes them.
    """
    begin = tl.load(query_start_ptr + sequence)
    own_end = tl.load(query_start_ptr + sequence + 1)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    before = tl.load(seq_lens_ptr + sequence) - (own_end - begin)
    end = own_end
    accepted = own_end * 0
    if RING:
        MOST: tl.constexpr = RING // 2
        keeps = slot < num_draft_slots
        single = keeps & (own_end - begin == 1)
        one_before = tl.maximum(sequence - 1, 0)
        follows = single & (sequence > 0) & (tl.load(slots_ptr + one_before) == slot)
        follows = follows & (begin - tl.load(query_start_ptr + one_before) == 1)
        lane = tl.arange(0, LANES)
        draft = sequence + 1 + lane
        theirs = single & (lane < MOST) & (draft < num_seqs)
        stop = tl.load(query_start_ptr + draft + 1, mask=theirs, other=0)
        theirs = theirs & (tl.load(slots_ptr + draft, mask=theirs, other=-1) == slot) & (stop == own_end + 1 + lane)
        end = own_end + tl.min(tl.where(theirs, LANES, lane), 0)
        end = tl.where(follows, begin, end)
        own_end = tl.where(follows, begin, own_end)
        missing = tl.minimum(tl.maximum(before - tl.load(state_lens_ptr + slot), 0), MOST)
        accepted = tl.where(keeps & (before > 0), missing, 0)
    return begin, own_end, end, slot, before, accepted


@triton.jit
def kept_row(drafts_ptr, slot, position, RING: tl.constexpr, WIDE: tl.constexpr):
    """Where the row of the token at this position is put aside, WIDE numbers."""
    return drafts_ptr + (slot * RING + position % RING) * WIDE


@triton.jit(do_not_specialize=["num_seqs"])
def count_states_kernel(
    state_lens_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, num_seqs, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        wait()
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = sequence < num_seqs
    one_before = tl.maximum(sequence - 1, 0)
    slot = tl.load(slots_ptr + sequence, mask=inside, other=-1)
    begin = tl.load(query_start_ptr + sequence, mask=inside, other=0)
    end = tl.load(query_start_ptr + sequence + 1, mask=inside, other=0)
    follows = (sequence > 0) & (tl.load(slots_ptr + one_before, mask=inside, other=-1) == slot)
    follows = follows & (begin - tl.load(query_start_ptr + one_before, mask=inside, other=0) == 1) & (end - begin == 1)
    length = tl.load(seq_lens_ptr + sequence, mask=inside, other=0)
    tl.store(state_lens_ptr + slot, length, mask=inside & (end > begin) & ~follows)


def count_states(state_lens: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor) -> None:
    """See `kernels.ops`."""
    count_states_kernel[(triton.cdiv(len(slots), BLOCK),)](
        state_lens, slots, query_start, seq_lens, len(slots), BLOCK=BLOCK, **dependent(slots.device)
    )
