"""Triton: what kernels share that take the prompts of a step in chunks: which chunk a program has.

A chunk is up to CHUNK rows of one sequence, counted from its first row in the step. Chunks have places without a count on the
host: those of sequence s begin at place query_start[s] // CHUNK + s, which leaves room for its chunks however its rows lie,
so a step of T rows and S sequences has at most T // CHUNK + S places. Places that no chunk falls on end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows of a sequence in a step, up to which they are taken one by one, as in a decode: a chunk costs more.
FEW = 8


def places(tokens: int, num_seqs: int, chunk: int) -> int:
    """Of all chunks of a step of so many rows."""
    return tokens // chunk + num_seqs


def precision_of(dtype: torch.dtype) -> str:
    """How tensor cores read float32 operands beside those of dtype: as TF32, 10 bits of mantissa, where bfloat16 with 7 is
    multiplied; as sums of TF32 numbers, three products for one, where float32 is, which leaves about the error of float32."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


@triton.jit
def chunk_at(place, query_start_ptr, num_seqs, CHUNK: tl.constexpr):
    """(first row of the sequence, its end, first row of the chunk at this place): no chunk where that is not before the end."""
    low = place * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        at_or_before = tl.load(query_start_ptr + middle) // CHUNK + middle <= place
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    begin = tl.load(query_start_ptr + low)
    end = tl.load(query_start_ptr + low + 1)
    return begin, end, begin + (place - begin // CHUNK - low) * CHUNK


@triton.jit
def running(decays):
    """Of log decays [CHUNK]: running sums as float32, what those leave out, and sums of what comes behind each.

    Where decays are strong, float32 alone would lose what counts in a difference of two sums.
    """
    sums = tl.cumsum(decays.to(tl.float64), 0)
    logs = sums.to(tl.float32)
    behind = tl.sum(decays.to(tl.float64), 0) - sums
    return logs, (sums - logs.to(tl.float64)).to(tl.float32), behind.to(tl.float32)


@triton.jit
def decayed(products, logs, left_out, row):
    """products [CHUNK, CHUNK] of each row with each, by the decay from the second to the first; 0 with later rows. See `running`."""
    # Chosen where a product is itself, that is anywhere but at NaN: so Triton computes exponents where products lie, and moves vectors
    # there instead of matrices.
    between = tl.where(products == products, logs[:, None], 0.0) - logs[None, :]
    between += left_out[:, None]
    between -= left_out[None, :]
    return products * tl.exp(tl.where(row[:, None] >= row[None, :], between, -float("inf")))
