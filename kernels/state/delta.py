"""Triton: the gated delta rule token by token, a program for each sequence, head and block of values. See `kernels.ops`.

A program holds its part of the state in registers while it takes the sequence's tokens one by one: a decode step reads and
writes the state once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

ELEMENTS = 4096  # of the state in a program
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def gated_delta_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, decay_ptr, beta_ptr, states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr,
    query_stride, key_stride, value_stride, query_heads, key_heads, value_heads, decay_stride, beta_stride, scale, num_rows,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, VECTOR: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_D)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    begin = tl.load(query_start_ptr + sequence)
    end = tl.load(query_start_ptr + sequence + 1)
    if (end > begin) & (end - begin <= num_rows):
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        goes_on = tl.load(seq_lens_ptr + sequence) > end - begin
        inside = (row < D)[:, None] & (column < DV)[None, :]
        places = states_ptr + ((slot * H + head) * D + row[:, None]) * DV + column[None, :]
        state = tl.load(places, mask=inside & goes_on, other=0.0)
        for done in range(end - begin):
            token = begin.to(tl.int64) + done
            query = tl.load(query_ptr + token * query_stride + head * query_heads + row, mask=row < D, other=0.0)
            key = tl.load(key_ptr + token * key_stride + head * key_heads + row, mask=row < D, other=0.0)
            value = tl.load(value_ptr + token * value_stride + head * value_heads + column, mask=column < DV, other=0.0)
            beta = tl.load(beta_ptr + token * beta_stride + head).to(tl.float32)
            query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
            if NORMALIZE:
                query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
                key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
            if VECTOR:
                decay = tl.load(decay_ptr + token * decay_stride + head * D + row, mask=row < D, other=0.0)
                state *= tl.exp(decay.to(tl.float32))[:, None]
            else:
                state *= tl.exp(tl.load(decay_ptr + token * decay_stride + head).to(tl.float32))
            change = (value - tl.sum(state * key[:, None], 0)) * beta
            state += key[:, None] * change[None, :]
            found = tl.sum(state * query[:, None], 0) * scale
            tl.store(out_ptr + (token * H + head) * DV + column, found.to(out_ptr.dtype.element_ty), mask=column < DV)
        tl.store(places, state, mask=inside)


def gated_delta_rows(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor,
    query_start: Tensor, seq_lens: Tensor, normalize: bool, num_rows: int,
) -> None:  # fmt: skip
    """Rows of `out` [T, H, Dv] and states of the sequences with at most `num_rows` rows; see `kernels.ops` for the arguments.

    query, key and value have stride 1 in their last dimension, beta in its last, decay is contiguous.
    """
    heads, size = value.shape[1:]
    width = key.shape[2]
    block_d = triton.next_power_of_2(width)
    block_v = min(max(ELEMENTS // block_d, 8), triton.next_power_of_2(size))
    gated_delta_kernel[(len(slots), heads, triton.cdiv(size, block_v))](
        out, query, key, value, decay, beta, states, slots, query_start, seq_lens,
        query.stride(0), key.stride(0), value.stride(0), query.stride(1), key.stride(1), value.stride(1),
        decay.stride(0), beta.stride(0), width**-0.5, num_rows,
        H=heads, D=width, DV=size, VECTOR=decay.dim() == 3, NORMALIZE=normalize, BLOCK_D=block_d, BLOCK_V=block_v,
        num_warps=NUM_WARPS, **dependent(value.device),
    )  # fmt: skip
