"""Triton: rows of a step are sampled anew where a bitmask forbids the token that was sampled without it.

The largest score of all tokens is also the largest of those allowed, if its token is: then nothing is left to do, and
that is what a model does that writes what its grammar wants. Elsewhere parts of the vocabulary without an allowed token
cost neither logits nor noise. The arithmetic is `kernels.sampling.gumbel`'s. Knows no grammar.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.sampling.gumbel import BLOCK_V, NUM_WARPS, best_of_part, hand_over


@triton.jit
def is_forbidden(ids_ptr, words_ptr, row):
    """Whether bit t % 32 of word t // 32 is 0, of token t of the row; rows below 0 are no rows."""
    token = tl.load(ids_ptr + row, mask=row >= 0, other=0).to(tl.int32)
    return (row >= 0) & (((tl.load(words_ptr + token // 32) >> (token % 32)) & 1) == 0)


@triton.jit
def best_allowed_of_parts_kernel(
    score_ptr,
    token_ptr,
    ids_ptr,
    rows_ptr,
    bitmask_ptr,
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    index = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows_ptr + index)
    words_ptr = bitmask_ptr + index.to(tl.int64) * WORDS
    if is_forbidden(ids_ptr, words_ptr, row):
        token = part * BLOCK_V + tl.arange(0, BLOCK_V)
        words = tl.load(words_ptr + token // 32, mask=token < VOCAB, other=0)
        allowed = ((words >> (token % 32)) & 1) != 0
        score, best = float("-inf"), part * BLOCK_V
        if tl.max(allowed.to(tl.int32), 0) > 0:
            score, best = best_of_part(
                logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, row_stride, row, part, allowed, BLOCK_V
            )
        tl.store(score_ptr + index * PARTS + part, score)
        tl.store(token_ptr + index * PARTS + part, best)


@triton.jit
def best_allowed_of_row_kernel(
    ids_ptr,
    last_tokens_ptr,
    last_at_ptr,
    rows_ptr,
    bitmask_ptr,
    score_ptr,
    token_ptr,
    positions_ptr,
    slots_ptr,
    sampled_ptr,
    WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    if is_forbidden(ids_ptr, bitmask_ptr + index.to(tl.int64) * WORDS, row):
        part = tl.arange(0, PARTS_PAD)
        scores = tl.load(score_ptr + index * PARTS + part, mask=part < PARTS, other=float("-inf"))
        hand_over(
            ids_ptr,
            last_tokens_ptr,
            last_at_ptr,
            scores,
            token_ptr + index * PARTS,
            positions_ptr,
            slots_ptr,
            sampled_ptr,
            row,
        )


def sample_allowed(
    ids: Tensor,
    rows: Tensor,
    bitmask: Tensor,
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
) -> None:
    """See `kernels.ops`. Of equal logits the first."""
    logits = logits.contiguous()
    vocab, (num_rows, words) = logits.shape[1], bitmask.shape
    parts = -(-vocab // BLOCK_V)
    scores = torch.empty(num_rows, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_rows, parts, dtype=torch.int32, device=logits.device)
    launch = dict(num_warps=NUM_WARPS, **dependent(logits.device))
    best_allowed_of_parts_kernel[num_rows, parts](
        scores,
        tokens,
        ids,
        rows,
        bitmask,
        logits,
        temperature,
        seeds,
        positions,
        logits.stride(0),
        VOCAB=vocab,
        WORDS=words,
        BLOCK_V=BLOCK_V,
        PARTS=parts,
        **launch,
    )
    best_allowed_of_row_kernel[(num_rows,)](
        ids,
        last_tokens,
        last_at,
        rows,
        bitmask,
        scores,
        tokens,
        positions,
        slots,
        sampled,
        WORDS=words,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        **launch,
    )
