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

BLOCK_T = 16
BLOCK_C = 128
NUM_WARPS = 4


@triton.jit
def _row(x_ptr, states_ptr, at, begin, slot, goes_on, column, x_stride, HISTORY: tl.constexpr, C: tl.constexpr, mask):
    """x's row `at`, or one of the rows before the step: of the state, or zeros where the sequence begins."""
    before = at - begin + HISTORY
    given = tl.load(x_ptr + at.to(tl.int64) * x_stride + column, mask=mask & (at >= begin), other=0.0)
    kept = tl.load(
        states_ptr + (slot * HISTORY + before) * C + column, mask=mask & (at < begin) & goes_on, other=0.0
    )  # fmt: skip
    return tl.where(at >= begin, given, kept)


@triton.jit
def sequences_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, x_stride,
    C: tl.constexpr, HISTORY: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < C
    begin = tl.load(query_start_ptr + sequence)
    end = tl.load(query_start_ptr + sequence + 1)
    if end > begin:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        goes_on = tl.load(seq_lens_ptr + sequence) > end - begin
        if COMPUTE:
            for done in range(end - begin):
                at = begin + done
                total = tl.zeros([BLOCK_C], tl.float32)
                for tap in tl.static_range(HISTORY + 1):
                    row = _row(
                        x_ptr, states_ptr, at - HISTORY + tap, begin, slot, goes_on, column, x_stride, HISTORY, C, mask
                    )
                    weight = tl.load(weight_ptr + column * (HISTORY + 1) + tap, mask=mask, other=0.0)
                    total += row.to(tl.float32) * weight.to(tl.float32)
                if bias_ptr is not None:
                    total += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
                if SILU:
                    total = total / (1 + tl.exp(-total))
                tl.store(out_ptr + at.to(tl.int64) * C + column, total.to(out_ptr.dtype.element_ty), mask=mask)
        # Rows move to the front: each is read before the ones that are written later could be it.
        for kept in tl.static_range(HISTORY):
            row = _row(
                x_ptr, states_ptr, end - HISTORY + kept, begin, slot, goes_on, column, x_stride, HISTORY, C, mask
            )
            tl.store(states_ptr + (slot * HISTORY + kept) * C + column, row, mask=mask)


@triton.jit(do_not_specialize=["num_seqs"])
def tokens_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, num_seqs, x_stride,
    C: tl.constexpr, HISTORY: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
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
        before = tl.load(query_start_ptr + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin = tl.load(query_start_ptr + low)
    end = tl.load(query_start_ptr + low + 1)
    slot = tl.load(slots_ptr + low).to(tl.int64)[:, None]
    goes_on = (tl.load(seq_lens_ptr + low) > end - begin)[:, None]
    mask = (token < end)[:, None] & (column < C)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for tap in tl.static_range(HISTORY + 1):
        at = (token - HISTORY + tap)[:, None]
        row = _row(x_ptr, states_ptr, at, begin[:, None], slot, goes_on, column[None, :], x_stride, HISTORY, C, mask)
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
    silu: bool,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, channels = x.shape
    out = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    one_by_one = tokens <= len(slots)
    given = out, x, weight.contiguous(), bias, states, slots, query_start, seq_lens
    sizes = dict(C=channels, HISTORY=states.shape[1], SILU=silu, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS)
    blocks = triton.cdiv(channels, BLOCK_C)
    if not one_by_one:
        tokens_kernel[(triton.cdiv(tokens, BLOCK_T), blocks)](
            *given, len(slots), x.stride(0), BLOCK_T=BLOCK_T, **sizes, **dependent(x.device)
        )
    sequences_kernel[(len(slots), blocks)](*given, x.stride(0), COMPUTE=one_by_one, **sizes, **dependent(x.device))
    return out
