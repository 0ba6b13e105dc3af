"""Triton: state space models with a decay for each element of the state over prompts. See `kernels.ops`.

Such a state is no product of matrices. A program holds that of a few channels and takes BLOCK_T rows at a time: what they load waits
once for all of them, and the recurrence S_t = a_t * S_(t-1) + b_t is a scan of pairs, (a, b) then (c, d) being (a * c, c * b + d),
which a thread does for its own elements. All is float32, as in a decode.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.state.chunks import FEW
from pagegraph.kernels.state.scan import state_block

BLOCK_T = 16
ELEMENTS = 256  # of the state in a program
NUM_WARPS = 4


@triton.jit
def _then(a, b, c, d):
    return a * c, c * b + d


@triton.jit
def scan_prompts_kernel(
    out_ptr, x_ptr, dt_ptr, rates_ptr, b_ptr, c_ptr, d_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr,
    x_stride, x_heads, dt_stride, b_stride, c_stride, b_groups, c_groups,
    CHANNELS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, OF_GROUP: tl.constexpr, FEW: tl.constexpr,
    LOG: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    sequence, first = tl.program_id(0), tl.program_id(1) * BLOCK_C
    begin = tl.load(query_start_ptr + sequence)
    end = tl.load(query_start_ptr + sequence + 1)
    if end - begin > FEW:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        goes_on = tl.load(seq_lens_ptr + sequence) > end - begin
        channel = first + tl.arange(0, BLOCK_C)
        head, group = channel // P, first // OF_GROUP
        column = tl.arange(0, BLOCK_N)
        row = tl.arange(0, BLOCK_T)
        inside = (channel < CHANNELS)[:, None] & (column < N)[None, :]
        places = states_ptr + (slot * CHANNELS + channel[:, None]) * N + column[None, :]
        state = tl.load(places, mask=inside & goes_on, other=0.0)
        rates = tl.load(rates_ptr + head[:, None] * N + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rates = -tl.exp(rates) if LOG else rates
        for done in range(0, end - begin, BLOCK_T):
            live = done + row < end - begin
            start = begin.to(tl.int64) + done
            mask = live[:, None] & (channel < CHANNELS)[None, :]
            dt = tl.load(dt_ptr + start * dt_stride + row[:, None] * dt_stride + head[None, :], mask=mask, other=0.0)
            at = row[:, None] * x_stride + head[None, :] * x_heads + (channel % P)[None, :]
            x = tl.load(x_ptr + start * x_stride + at, mask=mask, other=0.0).to(tl.float32)
            of_state = live[:, None] & (column < N)[None, :]
            at = group * b_groups + row[:, None] * b_stride + column[None, :]
            b = tl.load(b_ptr + start * b_stride + at, mask=of_state, other=0.0).to(tl.float32)
            at = group * c_groups + row[:, None] * c_stride + column[None, :]
            c = tl.load(c_ptr + start * c_stride + at, mask=of_state, other=0.0).to(tl.float32)
            kept = tl.exp(dt[:, :, None] * rates[None, :, :])
            added = (dt * x)[:, :, None] * b[:, None, :]
            added += tl.where((row == 0)[:, None, None], kept * state[None, :, :], 0.0)
            _, states = tl.associative_scan((kept, added), 0, _then)
            found = tl.sum(states * c[:, None, :], 2)
            if d_ptr is not None:
                found += tl.load(d_ptr + head, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :] * x
            at = row[:, None] * CHANNELS + channel[None, :]
            tl.store(out_ptr + start * CHANNELS + at, found, mask=mask)
            # Rows behind the end keep all and add nothing.
            state = tl.sum(tl.where((row == BLOCK_T - 1)[:, None, None], states, 0.0), 0)
        tl.store(places, state, mask=inside)


def selective_scan_prompts(
    out: Tensor, x: Tensor, dt: Tensor, A: Tensor, A_log: bool, B: Tensor, C: Tensor, D: Tensor | None, states: Tensor,
    slots: Tensor, query_start: Tensor, seq_lens: Tensor,
) -> None:  # fmt: skip
    """Rows of `out` [T, H, P] and states of the sequences with more than FEW rows, A being [H, N]; see `kernels.ops`.

    x, dt, B and C have stride 1 in their last dimension, A is contiguous.
    """
    heads, size = x.shape[1:]
    channels, width = heads * size, B.shape[2]
    of_group = channels // B.shape[1]
    block_c, block_n = state_block(channels, width, B.shape[1], ELEMENTS)
    scan_prompts_kernel[(len(slots), triton.cdiv(channels, block_c))](
        out, x, dt, A, B, C, D, states, slots, query_start, seq_lens,
        x.stride(0), x.stride(1), dt.stride(0), B.stride(0), C.stride(0), B.stride(1), C.stride(1),
        CHANNELS=channels, P=size, N=width, OF_GROUP=of_group, FEW=FEW, LOG=A_log, BLOCK_T=BLOCK_T,
        BLOCK_C=block_c, BLOCK_N=block_n, num_warps=NUM_WARPS, **dependent(x.device),
    )  # fmt: skip
