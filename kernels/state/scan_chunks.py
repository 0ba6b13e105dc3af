"""Triton: state space models with one decay a head over prompts, in chunks of products of matrices. See `kernels.ops`.

With c the running sum of a chunk's dt * A, S the state before it and rows of B, C and X as the op has them (Dao and Gu, 2024,
"Transformers are SSMs", arXiv 2405.21060, section 6):

    y = exp(c) * (C S^T) + (exp(c_t - c_s) dt_s (C_t . B_s) for s <= t) X
    S' = exp(c_last) * S + (exp(c_last - c) * dt * X)^T B

A program goes along a sequence with the state of one head, or a part of it, in registers. C B^T is the same for all heads of a group
and computed by each: loading what another kernel had left of it would take as long. No exponent is above zero.

D x is part of the product with X, as D on the diagonal of what stands before it. Products are of x's dtype and added up in float32; S and
decays are float32. With float32 (`precision_of`) the kernel needs more registers than there are: right, and slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.state.chunks import FEW, decayed, precision_of, running

CHUNK = 64  # rows
CHANNELS = 64  # of a head in a program
NUM_WARPS = 4
NUM_STAGES = 2
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def scan_chunks_kernel(
    out_ptr, x_ptr, dt_ptr, rates_ptr, b_ptr, c_ptr, d_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr,
    x_stride: tl.constexpr, x_heads: tl.constexpr, dt_stride: tl.constexpr, b_stride: tl.constexpr, c_stride: tl.constexpr,
    b_groups: tl.constexpr, c_groups: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, OF_GROUP: tl.constexpr, LOG: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, FEW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(query_start_ptr + sequence)
    end = tl.load(query_start_ptr + sequence + 1)
    if end - begin > FEW:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        goes_on = tl.load(seq_lens_ptr + sequence) > end - begin
        row = tl.arange(0, CHUNK)
        channel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
        column = tl.arange(0, BLOCK_N)
        state_ptrs = states_ptr + ((slot * H + head) * P + channel[:, None]) * N + column[None, :]
        inside = (channel < P)[:, None] & (column < N)[None, :]
        state = tl.load(state_ptrs, mask=inside & goes_on, other=0.0)
        rate = tl.load(rates_ptr + head).to(tl.float32)
        rate = -tl.exp(rate) if LOG else rate
        group = head // OF_GROUP
        for done in tl.range(0, end - begin, CHUNK, disable_licm=True):
            live = done + row < end - begin
            start = begin.to(tl.int64) + done
            dt = tl.load(dt_ptr + start * dt_stride + head + row * dt_stride, mask=live, other=0.0).to(tl.float32)
            logs, left_out, behind = running(dt * rate)
            mask = live[:, None] & (column < N)[None, :]
            b_base = b_ptr + start * b_stride + group * b_groups
            c_base = c_ptr + start * c_stride + group * c_groups
            b = tl.load(b_base + row[:, None] * b_stride + column[None, :], mask=mask, other=0.0).to(OPERAND)
            c = tl.load(c_base + row[:, None] * c_stride + column[None, :], mask=mask, other=0.0).to(OPERAND)
            mask = live[:, None] & (channel < P)[None, :]
            x_base = x_ptr + start * x_stride + head * x_heads
            x = tl.load(x_base + row[:, None] * x_stride + channel[None, :], mask=mask, other=0.0)
            seen = tl.dot(c, tl.trans(b), input_precision=PRECISION)
            seen = decayed(seen, logs, left_out, row) * dt[None, :]
            if d_ptr is not None:
                seen += tl.where(row[:, None] == row[None, :], tl.load(d_ptr + head).to(tl.float32), 0.0)
            found = tl.dot(c, tl.trans(state.to(OPERAND)), input_precision=PRECISION) * tl.exp(logs)[:, None]
            found += tl.dot(seen.to(OPERAND), x.to(OPERAND), input_precision=PRECISION)
            out_ptrs = out_ptr + (start * H + head) * P + row[:, None] * (H * P) + channel[None, :]
            tl.store(out_ptrs, found, mask=mask)
            added = (x.to(tl.float32) * (dt * tl.exp(behind))[:, None]).to(OPERAND)
            state *= tl.exp(tl.sum(dt * rate, 0))
            state += tl.dot(tl.trans(added), b, input_precision=PRECISION)
        slot = tl.load(slots_ptr + sequence).to(tl.int64)  # again: addresses would stay in registers meanwhile
        state_ptrs = states_ptr + ((slot * H + head) * P + channel[:, None]) * N + column[None, :]
        tl.store(state_ptrs, state, mask=inside)


def selective_scan_chunks(
    out: Tensor, x: Tensor, dt: Tensor, A: Tensor, A_log: bool, B: Tensor, C: Tensor, D: Tensor | None, states: Tensor,
    slots: Tensor, query_start: Tensor, seq_lens: Tensor,
) -> None:  # fmt: skip
    """Rows of `out` [T, H, P] and states of the sequences with more than FEW rows, A being [H]; see `kernels.ops`.

    x, dt, B and C have stride 1 in their last dimension, A is contiguous.
    """
    heads, size = x.shape[1:]
    block_p = min(CHANNELS, max(triton.next_power_of_2(size), 16))
    # Strides as constants: registers are few, and a model has one set of them.
    scan_chunks_kernel[(len(slots), heads, triton.cdiv(size, block_p))](
        out, x, dt, A, B, C, D, states, slots, query_start, seq_lens,
        x.stride(0), x.stride(1), dt.stride(0), B.stride(0), C.stride(0), B.stride(1), C.stride(1),
        H=heads, P=size, N=B.shape[2], OF_GROUP=heads // B.shape[1], LOG=A_log, OPERAND=TYPES[x.dtype],
        PRECISION=precision_of(x.dtype), CHUNK=CHUNK, FEW=FEW, BLOCK_P=block_p,
        BLOCK_N=max(triton.next_power_of_2(B.shape[2]), 16), num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        **dependent(x.device),
    )  # fmt: skip
