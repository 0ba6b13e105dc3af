"""Triton: causal convolutions of a packed row, each sequence's from its slot's last rows. See `kernels.ops`.

In a decode, a step of as many tokens as sequences, a program takes a sequence and some channels, token by token, and writes its
state back: one kernel. In a step with prompts one kernel gives the results, tokens side by side, and a second the states, which the first still reads.
Most tokens of prompts lie behind as many of their sequence as a channel has taps: of these nothing is read but x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.state.drafts import draft_arguments, group_at, kept_row

# Of prompts: tokens side by side, how many times these one after the other, channels.
BLOCK_T, TIMES, BLOCK_C = 16, 4, 128
NUM_WARPS = 4
SEQUENCE_WARPS = 2
SEQUENCE_BLOCK_C = 512  # of a sequence: several channels a thread, as loads of few bytes wait alone


@triton.jit
def _weights(weight_ptr, column, C: tl.constexpr, HISTORY: tl.constexpr, TAPS: tl.constexpr):
    """Of some channels, float32 [BLOCK_C, TAPS]: neighbours in memory, which a load of each tap by itself would take one by one."""
    tap = tl.arange(0, TAPS)[None, :]
    mask = (column < C)[:, None]
    if TAPS > HISTORY + 1:  # a mask that differs from tap to tap would load them one by one, too
        mask &= tap <= HISTORY
    return tl.load(weight_ptr + column[:, None] * (HISTORY + 1) + tap, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _of_tap(weights, tap):
    """[BLOCK_C] of the weights' column."""
    taps = tl.arange(0, weights.shape[1])[None, :]
    return tl.sum(tl.where(taps == tap, weights, 0.0), 1)


@triton.jit
def _finished(total, bias_ptr, column, C: tl.constexpr, SILU: tl.constexpr):
    """The sum of all taps, of channels in the last dimension, with bias and gate."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1 + tl.exp(-total))
    return total


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
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < C
    if COMPUTE:
        weights = _weights(weight_ptr, column, C, HISTORY, TAPS)
    if PDL:
        wait()
    begin, own_end, end, slot, before, accepted = group_at(
        sequence, slots_ptr, query_start_ptr, seq_lens_ptr, state_lens_ptr, tl.num_programs(0), num_draft_slots, RING, LANES
    )  # fmt: skip
    if end > begin:
        if COMPUTE:
            for done in range(end - begin):
                at = begin + done
                total = tl.zeros([BLOCK_C], tl.float32)
                for tap in tl.static_range(HISTORY + 1):
                    row = _row(
                        x_ptr, states_ptr, drafts_ptr, at - HISTORY + tap, begin, slot, before, accepted, column, x_stride,
                        HISTORY, C, RING, mask,
                    )  # fmt: skip
                    total += row.to(tl.float32) * _of_tap(weights, tap)
                total = _finished(total, bias_ptr, column, C, SILU)
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


@triton.jit
def _tokens_anywhere(
    token, x_ptr, weights, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, x_stride, drafts_ptr, state_lens_ptr,
    num_draft_slots, num_seqs, column,
    C: tl.constexpr, HISTORY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """(sums of all taps [BLOCK_T, BLOCK_C], ends of the tokens' sequences) of tokens of several sequences, or at the front of one."""
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
        total += row.to(tl.float32) * _of_tap(weights, tap)[None, :]
    return total, end


@triton.jit(do_not_specialize=["num_seqs", "num_draft_slots"])
def tokens_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, x_stride,
    drafts_ptr, state_lens_ptr, num_draft_slots, num_seqs,
    C: tl.constexpr, HISTORY: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, TIMES: tl.constexpr,
    BLOCK_C: tl.constexpr, RING: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weights = _weights(weight_ptr, column, C, HISTORY, TAPS)
    if PDL:
        wait()
    first = tl.program_id(0) * (BLOCK_T * TIMES)
    low = first * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        at_or_before = tl.load(query_start_ptr + middle) <= first
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    begin = tl.load(query_start_ptr + low)
    end = tl.load(query_start_ptr + low + 1)
    # Blocks of tokens that are of this sequence, with all that they read. Two loops, so that weights lie as each wants them.
    inner = tl.maximum((begin + HISTORY - first + BLOCK_T - 1) // BLOCK_T, 0)
    inners = tl.maximum(tl.minimum((end - first) // BLOCK_T, TIMES) - inner, 0)
    block = tl.arange(0, BLOCK_T)
    for at in range(inners):
        start = (first + (inner + at) * BLOCK_T).to(tl.int64)
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for tap in tl.static_range(HISTORY + 1):
            rows = x_ptr + (start - HISTORY + tap) * x_stride + block[:, None] * x_stride
            row = tl.load(rows + column[None, :], mask=(column < C)[None, :], other=0.0)
            total += row.to(tl.float32) * _of_tap(weights, tap)[None, :]
        total = _finished(total, bias_ptr, column, C, SILU).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start * C + block[:, None] * C + column[None, :], total, mask=(column < C)[None, :])
    for at in range(TIMES - inners):
        token = first + (at + tl.where((at >= inner) & (inners > 0), inners, 0)) * BLOCK_T + block
        total, ends = _tokens_anywhere(
            token, x_ptr, weights, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, x_stride, drafts_ptr,
            state_lens_ptr, num_draft_slots, num_seqs, column, C, HISTORY, BLOCK_T, BLOCK_C, RING,
        )  # fmt: skip
        total = _finished(total, bias_ptr, column, C, SILU).to(out_ptr.dtype.element_ty)
        place = token.to(tl.int64)[:, None] * C + column[None, :]
        tl.store(out_ptr + place, total, mask=(token < ends)[:, None] & (column < C)[None, :])


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor,
    silu: bool, draft_rows: Tensor | None = None, state_lens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, channels = x.shape
    out = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    one_by_one = tokens <= len(slots)
    # A weight is read before the wait, a copy of it behind.
    pdl = dependent(x.device) if weight.is_contiguous() else {"PDL": False}
    given = out, x, weight.contiguous(), bias, states, slots, query_start, seq_lens, x.stride(0)
    taps = triton.next_power_of_2(weight.shape[1])
    sizes = dict(C=channels, HISTORY=states.shape[1], TAPS=taps, SILU=silu)
    sizes |= draft_arguments(draft_rows, state_lens) | pdl
    if not one_by_one:
        grid = triton.cdiv(tokens, BLOCK_T * TIMES), triton.cdiv(channels, BLOCK_C)
        tokens_kernel[grid](
            *given, num_seqs=len(slots), BLOCK_T=BLOCK_T, TIMES=TIMES, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS, **sizes
        )
    grid = len(slots), triton.cdiv(channels, SEQUENCE_BLOCK_C)
    sequences_kernel[grid](*given, COMPUTE=one_by_one, BLOCK_C=SEQUENCE_BLOCK_C, num_warps=SEQUENCE_WARPS, **sizes)
    return out
