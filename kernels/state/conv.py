"""Triton: causal convolutions of a packed row, each sequence's from its slot's last rows. See `kernels.ops`.

In a decode, a step of as many tokens as sequences, a program takes a sequence and some channels, token by token, and writes its
state back: one kernel. In a step with prompts one kernel gives the results, tokens side by side, and a second the states, which the first still reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.state.drafts import draft_arguments, group_at, kept_row

BLOCK_T = 16
BLOCK_C = 128
SEQUENCE_BLOCK_C = (
    512  # of a program that takes a sequence: several channels a thread, as loads of few bytes wait alone
)
NUM_WARPS = 4


@triton.jit
def _row(
    x_ptr, states_ptr, drafts_ptr, at, begin, slot, before, accepted, column, x_stride, HISTORY: tl.constexpr, C: tl.constexpr,
    RING: tl.constexpr, mask,
):  # fmt: skip
    """x's row `at`, or one before the step's: of an accepted draft token, of the state, or zeros where the sequence begins."""
    given = tl.load(x_ptr + at.to(tl.int64) * x_stride + column, mask=mask & (at >= begin), other=0.0)
    place = at - begin + accepted + HISTORY  # in the state
    in_state = mask & (at - begin < -accepted) & (before > 0)
    found = tl.load(states_ptr + (slot * HISTORY + place) * C + column, mask=in_state, other=0.0)
    if RING:
        aside = mask & (at < begin) & (begin - at <= accepted)
        row = tl.load(kept_row(drafts_ptr, slot, before + at - begin, RING, C) + column, mask=aside, other=0.0)
        found = tl.where(aside, row, found)
    return tl.where(at >= begin, given, found)


@triton.jit(do_not_specialize=["num_draft_slots"])
def sequences_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, x_stride,
    drafts_ptr, state_lens_ptr, num_draft_slots,
    C: tl.constexpr, HISTORY: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr,
    RING: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < C
    begin, own_end, end, slot, before, accepted = group_at(
        sequence, slots_ptr, query_start_ptr, seq_lens_ptr, state_lens_ptr, tl.num_programs(0), num_draft_slots, RING, LANES
    )  # fmt: skip
    if end > begin:
        if COMPUTE:
            tap_of = tl.arange(0, TAPS)[None, :]
            at_weights = weight_ptr + column[:, None] * (HISTORY + 1) + tap_of
            # A mask that differs from tap to tap would load them one by one.
            there = mask[:, None] if TAPS == HISTORY + 1 else mask[:, None] & (tap_of <= HISTORY)
            weights = tl.load(at_weights, mask=there, other=0.0).to(tl.float32)
            for done in range(end - begin):
                at = begin + done
                total = tl.zeros([BLOCK_C], tl.float32)
                for tap in tl.static_range(HISTORY + 1):
                    row = _row(
                        x_ptr, states_ptr, drafts_ptr, at - HISTORY + tap, begin, slot, before, accepted, column, x_stride,
                        HISTORY, C, RING, mask,
                    )  # fmt: skip
                    total += row.to(tl.float32) * tl.sum(tl.where(tap_of == tap, weights, 0.0), 1)
                if bias_ptr is not None:
                    total += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
                if SILU:
                    total = total / (1 + tl.exp(-total))
                tl.store(out_ptr + at.to(tl.int64) * C + column, total.to(out_ptr.dtype.element_ty), mask=mask)
        # Rows move to the front: each is read before the ones that are written later could be it.
        for kept in tl.static_range(HISTORY):
            row = _row(
                x_ptr, states_ptr, drafts_ptr, own_end - HISTORY + kept, begin, slot, before, accepted, column, x_stride,
                HISTORY, C, RING, mask,
            )  # fmt: skip
            tl.store(states_ptr + (slot * HISTORY + kept) * C + column, row, mask=mask)
        if RING:
            for done in range(end - own_end):
                at = own_end + done
                row = tl.load(x_ptr + at.to(tl.int64) * x_stride + column, mask=mask, other=0.0)
                tl.store(kept_row(drafts_ptr, slot, before + at - begin, RING, C) + column, row, mask=mask)


@triton.jit(do_not_specialize=["num_seqs", "num_draft_slots"])
def tokens_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, x_stride,
    drafts_ptr, state_lens_ptr, num_draft_slots, num_seqs,
    C: tl.constexpr, HISTORY: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    RING: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Which sequence a token is of: the last that starts at or before it.
    low = tl.zeros([BLOCK_T], tl.int32)
    high = tl.zeros([BLOCK_T], tl.int32) + num_seqs
    while tl.max(high - low, 0) > 1:
        middle = (low + high) // 2
        at_or_before = tl.load(query_start_ptr + middle) <= token
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    begin = tl.load(query_start_ptr + low)
    end = tl.load(query_start_ptr + low + 1)
    slot = tl.load(slots_ptr + low).to(tl.int64)
    before = tl.load(seq_lens_ptr + low) - (end - begin)
    accepted = begin * 0
    if RING:
        # Of a draft token: what the query has before it that the state and its accepted draft tokens are before.
        MOST: tl.constexpr = RING // 2
        back = tl.zeros([BLOCK_T], tl.int32)
        goes_back = (slot < num_draft_slots) & (end - begin == 1)
        for step in range(MOST):
            one_before = tl.maximum(low - step - 1, 0)
            goes_back = goes_back & (low - step > 0) & (tl.load(slots_ptr + one_before) == slot)
            goes_back = goes_back & (begin - step - tl.load(query_start_ptr + one_before) == 1)
            back += goes_back.to(tl.int32)
        begin -= back
        before -= back
        missing = tl.minimum(tl.maximum(before - tl.load(state_lens_ptr + slot), 0), MOST)
        accepted = tl.where((slot < num_draft_slots) & (before > 0), missing, 0)
    begin, slot, before, accepted = begin[:, None], slot[:, None], before[:, None], accepted[:, None]
    mask = (token < end)[:, None] & (column < C)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for tap in tl.static_range(HISTORY + 1):
        at = (token - HISTORY + tap)[:, None]
        row = _row(
            x_ptr, states_ptr, drafts_ptr, at, begin, slot, before, accepted, column[None, :], x_stride, HISTORY, C, RING, mask
        )  # fmt: skip
        weight = tl.load(weight_ptr + column * (HISTORY + 1) + tap, mask=column < C, other=0.0)
        total += row.to(tl.float32) * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total / (1 + tl.exp(-total))
    place = token.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor,
    silu: bool, draft_rows: Tensor | None = None, state_lens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, channels = x.shape
    out = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    one_by_one = tokens <= len(slots)
    given = out, x, weight.contiguous(), bias, states, slots, query_start, seq_lens, x.stride(0)
    sizes = dict(C=channels, HISTORY=states.shape[1], SILU=silu, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS)
    sizes |= draft_arguments(draft_rows, state_lens) | dependent(x.device)
    if not one_by_one:
        blocks = triton.cdiv(channels, BLOCK_C)
        tokens_kernel[(triton.cdiv(tokens, BLOCK_T), blocks)](*given, num_seqs=len(slots), BLOCK_T=BLOCK_T, **sizes)
    sizes |= dict(BLOCK_C=SEQUENCE_BLOCK_C, TAPS=triton.next_power_of_2(weight.shape[1]))
    sequences_kernel[(len(slots), triton.cdiv(channels, SEQUENCE_BLOCK_C))](*given, COMPUTE=one_by_one, **sizes)
    return out
