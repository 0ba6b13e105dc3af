"""Triton: state space models token by token, a program for each sequence and block of channels. See `kernels.ops`.

A program holds its part of the state in registers while it takes the sequence's tokens one by one: a decode step reads and
writes the state once, with draft tokens (`kernels.state.drafts`) too. Channels are heads times their sizes; those of a program share the group whose B and C they take.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.state.drafts import draft_arguments, group_at, kept_row
from pagegraph.kernels.state.time_steps import Steps, stepped

# Of the state in a program, and its warps: with one decay a head, whose step is most of what a program computes, and else.
ELEMENTS, NUM_WARPS = 1024, 2
VECTOR_ELEMENTS, VECTOR_WARPS = 4096, 4


@triton.jit(do_not_specialize=["num_rows", "num_draft_slots"])
def selective_scan_kernel(
    out_ptr, x_ptr, dt_ptr, bias_ptr, rates_ptr, b_ptr, c_ptr, d_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr,
    x_stride, x_heads, dt_stride, b_stride, c_stride, b_groups, c_groups, num_rows,
    drafts_ptr, state_lens_ptr, num_draft_slots,
    CHANNELS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, A_GROUP: tl.constexpr, VECTOR: tl.constexpr, LOG: tl.constexpr,
    SOFTPLUS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, RING: tl.constexpr,
    LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    sequence, first = tl.program_id(0), tl.program_id(1) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    head, group = channel // P, first // A_GROUP
    column = tl.arange(0, BLOCK_N)
    there, inside = channel < CHANNELS, (channel < CHANNELS)[:, None] & (column < N)[None, :]
    begin, own_end, end, slot, before, accepted = group_at(
        sequence, slots_ptr, query_start_ptr, seq_lens_ptr, state_lens_ptr, tl.num_programs(0), num_draft_slots, RING, LANES
    )  # fmt: skip
    few = own_end - begin <= num_rows
    if (end > begin) & (few | (accepted > 0)):
        places = states_ptr + (slot * CHANNELS + channel[:, None]) * N + column[None, :]
        state = tl.load(places, mask=inside & (before > 0), other=0.0)
        if VECTOR:
            rates = tl.load(rates_ptr + head[:, None] * N + column[None, :], mask=inside, other=0.0)
        else:
            rates = tl.load(rates_ptr + head, mask=there, other=0.0)[:, None]
        rates = -tl.exp(rates.to(tl.float32)) if LOG else rates.to(tl.float32)
        bias = None if bias_ptr is None else tl.load(bias_ptr + head, mask=there, other=0.0)
        HEADS: tl.constexpr = CHANNELS // P
        WIDE: tl.constexpr = CHANNELS + HEADS + CHANNELS // A_GROUP * N
        if RING:
            for done in range(accepted):
                kept = kept_row(drafts_ptr, slot, before - accepted + done, RING, WIDE)
                x = tl.load(kept + channel, mask=there, other=0.0)
                dt = tl.load(kept + CHANNELS + head, mask=there, other=0.0)
                b = tl.load(kept + CHANNELS + HEADS + group * N + column, mask=column < N, other=0.0)
                state = state * tl.exp(dt[:, None] * rates) + (dt * x)[:, None] * b[None, :]
            tl.store(places, state, mask=inside & (not few))  # chunks go on from there
            end = tl.where(few, end, begin)
        for done in range(end - begin):
            token = begin.to(tl.int64) + done
            dt = tl.load(dt_ptr + token * dt_stride + head, mask=there, other=0.0)
            dt = stepped(dt, bias, SOFTPLUS, LEAST, MOST)
            x = tl.load(x_ptr + token * x_stride + head * x_heads + channel % P, mask=there, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + token * b_stride + group * b_groups + column, mask=column < N, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + token * c_stride + group * c_groups + column, mask=column < N, other=0.0).to(tl.float32)
            state = state * tl.exp(dt[:, None] * rates) + (dt * x)[:, None] * b[None, :]
            found = tl.sum(state * c[None, :], 1)
            if d_ptr is not None:
                found += tl.load(d_ptr + head, mask=there, other=0.0).to(tl.float32) * x
            tl.store(out_ptr + token * CHANNELS + channel, found, mask=there)
            if RING:
                tl.store(places, state, mask=inside & (token + 1 == own_end))
                if token >= own_end:
                    kept = kept_row(drafts_ptr, slot, before + done, RING, WIDE)
                    tl.store(kept + channel, x, mask=there)
                    tl.store(kept + CHANNELS + head, dt, mask=there & (channel % P == 0))
                    of_group = (column < N) & (first % A_GROUP == 0)
                    tl.store(kept + CHANNELS + HEADS + group * N + column, b, mask=of_group)
        if not RING:
            tl.store(places, state, mask=inside)


def state_block(channels: int, width: int, groups: int, elements: int) -> tuple[int, int]:
    """Channels and columns of the state that a program takes, about `elements` in all and of one group."""
    block_n = int(triton.next_power_of_2(width))
    block_c = min(max(elements // block_n, 1), int(triton.next_power_of_2(channels)))
    return math.gcd(block_c, channels // groups) if groups > 1 else block_c, block_n


def selective_scan_rows(
    out: Tensor, x: Tensor, steps: Steps, A: Tensor, A_log: bool, B: Tensor, C: Tensor, D: Tensor | None, states: Tensor,
    slots: Tensor, query_start: Tensor, seq_lens: Tensor, num_rows: int, draft_rows: Tensor | None = None,
    state_lens: Tensor | None = None,
) -> None:  # fmt: skip
    """Rows of `out` [T, H, P] and states of the sequences with at most `num_rows` rows; see `kernels.ops` for the arguments.

    Of the others only the accepted draft tokens of the step before are taken up.

    x, dt, B and C have stride 1 in their last dimension, A is contiguous.
    """
    heads, size = x.shape[1:]
    channels, width = heads * size, B.shape[2]
    of_group = channels // B.shape[1]
    vector = A.dim() == 2
    elements, warps = (VECTOR_ELEMENTS, VECTOR_WARPS) if vector else (ELEMENTS, NUM_WARPS)
    block_c, block_n = state_block(channels, width, B.shape[1], elements)
    selective_scan_kernel[(len(slots), triton.cdiv(channels, block_c))](
        out, x, steps.dt, steps.bias, A, B, C, D, states, slots, query_start, seq_lens,
        x.stride(0), x.stride(1), steps.dt.stride(0), B.stride(0), C.stride(0), B.stride(1), C.stride(1), num_rows,
        CHANNELS=channels, P=size, N=width, A_GROUP=of_group, VECTOR=vector, LOG=A_log,
        BLOCK_C=block_c, BLOCK_N=block_n, num_warps=warps, **steps.constants, **draft_arguments(draft_rows, state_lens),
        **dependent(x.device),
    )  # fmt: skip
