"""Triton: the gated delta rule token by token, a program for each sequence, head and block of values. See `kernels.ops`.

A program holds its part of the state in registers while it takes the sequence's tokens one by one: a decode step reads and
writes the state once, with draft tokens (`kernels.state.drafts`) too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.state.drafts import draft_arguments, group_at, kept_row
from pagegraph.kernels.state.gates import log_decay, share

# Of the state in a program: of a few sequences, and of as many as fill the device several times anyway.
ELEMENTS, MANY_ELEMENTS, MANY = 4096, 8192, 32
NUM_WARPS = 4


@triton.jit
def _taken_up(state, key, value, decay, beta, VECTOR: tl.constexpr, NORMALIZE: tl.constexpr):
    """The state behind a token: decay [D] or a number."""
    key, value = key.to(tl.float32), value.to(tl.float32)
    if NORMALIZE:
        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
    kept = tl.exp(decay.to(tl.float32))
    if VECTOR:
        kept = kept[:, None]
    state *= kept
    change = (value - tl.sum(state * key[:, None], 0)) * beta.to(tl.float32)
    return state + key[:, None] * change[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_draft_slots"])
def gated_delta_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, decay_ptr, beta_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr,
    query_stride, key_stride, value_stride, query_heads, key_heads, value_heads, decay_stride, beta_stride, scale, num_rows,
    drafts_ptr, state_lens_ptr, num_draft_slots, A_log_ptr, dt_bias_ptr,
    H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, VECTOR: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, RING: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    sequence, head = tl.program_id(0), tl.program_id(1)
    key_head = head // SHARE
    row = tl.arange(0, BLOCK_D)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    begin, own_end, end, slot, before, accepted = group_at(
        sequence, slots_ptr, query_start_ptr, seq_lens_ptr, state_lens_ptr, tl.num_programs(0), num_draft_slots, RING, LANES
    )  # fmt: skip
    few = own_end - begin <= num_rows
    if (end > begin) & (few | (accepted > 0)):
        inside = (row < D)[:, None] & (column < DV)[None, :]
        places = states_ptr + ((slot * H + head) * D + row[:, None]) * DV + column[None, :]
        state = tl.load(places, mask=inside & (before > 0), other=0.0)
        WIDTH: tl.constexpr = D if VECTOR else 1  # of decays
        WIDE: tl.constexpr = H * (D + DV + WIDTH + 1)
        if RING:
            for done in range(accepted):
                kept = kept_row(drafts_ptr, slot, before - accepted + done, RING, WIDE)
                key = tl.load(kept + head * D + row, mask=row < D, other=0.0)
                value = tl.load(kept + H * D + head * DV + column, mask=column < DV, other=0.0)
                if VECTOR:
                    decay = tl.load(kept + H * (D + DV) + head * D + row, mask=row < D, other=0.0)
                else:
                    decay = tl.load(kept + H * (D + DV) + head)
                beta = tl.load(kept + H * (D + DV + WIDTH) + head)
                state = _taken_up(state, key, value, decay, beta, VECTOR, NORMALIZE)
            tl.store(places, state, mask=inside & (not few))  # chunks go on from there
            end = tl.where(few, end, begin)
        for done in range(end - begin):
            token = begin.to(tl.int64) + done
            query = tl.load(query_ptr + token * query_stride + key_head * query_heads + row, mask=row < D, other=0.0)
            key = tl.load(key_ptr + token * key_stride + key_head * key_heads + row, mask=row < D, other=0.0)
            value = tl.load(value_ptr + token * value_stride + head * value_heads + column, mask=column < DV, other=0.0)
            beta = tl.load(beta_ptr + token * beta_stride + head)
            if A_log_ptr is not None:
                beta = share(beta)
            query = query.to(tl.float32)
            if NORMALIZE:
                query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
            if VECTOR:
                decay = tl.load(decay_ptr + token * decay_stride + head * D + row, mask=row < D, other=0.0)
            else:
                decay = tl.load(decay_ptr + token * decay_stride + head)
                if A_log_ptr is not None:
                    decay = log_decay(decay, A_log_ptr, dt_bias_ptr, head)
            state = _taken_up(state, key, value, decay, beta, VECTOR, NORMALIZE)
            found = tl.sum(state * query[:, None], 0) * scale
            tl.store(out_ptr + (token * H + head) * DV + column, found.to(out_ptr.dtype.element_ty), mask=column < DV)
            if RING:
                tl.store(places, state, mask=inside & (token + 1 == own_end))
                if token >= own_end:
                    kept = kept_row(drafts_ptr, slot, before + done, RING, WIDE)
                    tl.store(kept + H * D + head * DV + column, value.to(tl.float32), mask=column < DV)
                    if tl.program_id(2) == 0:
                        tl.store(kept + head * D + row, key.to(tl.float32), mask=row < D)
                        if VECTOR:
                            tl.store(kept + H * (D + DV) + head * D + row, decay.to(tl.float32), mask=row < D)
                        else:
                            tl.store(kept + H * (D + DV) + head, decay.to(tl.float32))
                        tl.store(kept + H * (D + DV + WIDTH) + head, beta.to(tl.float32))
        if not RING:
            tl.store(places, state, mask=inside)


def gated_delta_rows(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor,
    query_start: Tensor, seq_lens: Tensor, normalize: bool, num_rows: int, draft_rows: Tensor | None = None,
    state_lens: Tensor | None = None, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Rows of `out` [T, H, Dv] and states of the sequences with at most `num_rows` rows; see `kernels.ops` for the arguments.

    Of the others only the accepted draft tokens of the step before are taken up.

    query, key, value, beta and decay have stride 1 in their last dimension; one decay for each channel is contiguous.
    """
    heads, size = value.shape[1:]
    width = key.shape[2]
    block_d = triton.next_power_of_2(width)
    block_v = min(max((MANY_ELEMENTS if len(slots) >= MANY else ELEMENTS) // block_d, 8), triton.next_power_of_2(size))
    gated_delta_kernel[(len(slots), heads, triton.cdiv(size, block_v))](
        out, query, key, value, decay, beta, states, slots, query_start, seq_lens,
        query.stride(0), key.stride(0), value.stride(0), query.stride(1), key.stride(1), value.stride(1),
        decay.stride(0), beta.stride(0), width**-0.5, num_rows, A_log_ptr=A_log, dt_bias_ptr=dt_bias,
        H=heads, SHARE=heads // key.shape[1], D=width, DV=size, VECTOR=decay.dim() == 3, NORMALIZE=normalize, BLOCK_D=block_d, BLOCK_V=block_v,
        num_warps=NUM_WARPS, **draft_arguments(draft_rows, state_lens), **dependent(value.device),
    )  # fmt: skip
