"""Triton: the next token by Gumbel-max over the vocabulary, without a sort and without noise in memory.

The noise is `kernels.sampling.reference.gumbel`, computed where it is added. Two kernels: the best token of each part of
the vocabulary, then the best of the parts, which the next step finds too. Knows no filters: they have made their tokens -inf before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

BLOCK_V = 2048
NUM_WARPS = 4


@triton.jit
def mix32(words):
    """`kernels.sampling.reference.mix32` on uint32."""
    words = (words ^ (words >> 16)) * 0x85EBCA6B
    words = (words ^ (words >> 13)) * 0xC2B2AE35
    return words ^ (words >> 16)


@triton.jit
def random_bits(seed, position, token):
    """The 32 random bits of (seed int64, position int32, token ids int32 [N])."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    stream = mix32(low ^ mix32(high ^ mix32((position.to(tl.int64) + 0x9E3779B9).to(tl.uint32))))
    return mix32(stream ^ mix32((token + 1).to(tl.uint32)))


@triton.jit
def gumbel(bits):
    """`kernels.sampling.reference.gumbel` of random bits: -log(-log(1 - u)) with u of 32 bits."""
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log(1 - u) cancels for small u, where the largest noise is made: a series instead.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def best_of_part(
    logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, row_stride, row, part, allowed, BLOCK_V: tl.constexpr
):
    """(score, token) of the best token of a row's part among those with `allowed` bool [BLOCK_V], noise added."""
    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    at = logits_ptr + row.to(tl.int64) * row_stride + token
    logits = tl.load(at, mask=allowed, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        seed = tl.load(seeds_ptr + row)
        position = tl.load(positions_ptr + row)
        logits = logits / temperature + gumbel(random_bits(seed, position, token))
    score, best = tl.max(logits, 0, return_indices=True)
    return score, part * BLOCK_V + best


@triton.jit
def hand_over(
    ids_ptr,
    last_tokens_ptr,
    last_at_ptr,
    scores,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    sampled_ptr,
    row,
):
    """Write the token of the best of `scores` where the host and the next step find it; its token is at tokens_ptr."""
    token = tl.load(tokens_ptr + tl.argmax(scores, 0))
    tl.store(ids_ptr + row, token.to(tl.int64))
    if tl.load(sampled_ptr + row) > 0:
        owner = tl.load(slots_ptr + row)
        tl.store(last_tokens_ptr + owner, token)
        tl.store(last_at_ptr + owner, tl.load(positions_ptr + row))


@triton.jit
def best_of_parts_kernel(
    score_ptr,
    token_ptr,
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    row = tl.program_id(0)
    part = tl.program_id(1)
    inside = part * BLOCK_V + tl.arange(0, BLOCK_V) < VOCAB
    score, token = best_of_part(
        logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, row_stride, row, part, inside, BLOCK_V
    )
    tl.store(score_ptr + row * PARTS + part, score)
    tl.store(token_ptr + row * PARTS + part, token)


@triton.jit
def best_of_row_kernel(
    ids_ptr,
    last_tokens_ptr,
    last_at_ptr,
    score_ptr,
    token_ptr,
    positions_ptr,
    slots_ptr,
    sampled_ptr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    row = tl.program_id(0)
    part = tl.arange(0, PARTS_PAD)
    scores = tl.load(score_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    hand_over(
        ids_ptr,
        last_tokens_ptr,
        last_at_ptr,
        scores,
        token_ptr + row * PARTS,
        positions_ptr,
        slots_ptr,
        sampled_ptr,
        row,
    )


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
) -> Tensor:
    """See `kernels.ops`. Of equal logits the first."""
    logits = logits.contiguous()
    seqs, vocab = logits.shape
    parts = -(-vocab // BLOCK_V)
    scores = torch.empty(seqs, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(seqs, parts, dtype=torch.int32, device=logits.device)
    ids = torch.empty(seqs, dtype=torch.int64, device=logits.device)
    best_of_parts_kernel[seqs, parts](
        scores,
        tokens,
        logits,
        temperature,
        seeds,
        positions,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK_V=BLOCK_V,
        PARTS=parts,
        num_warps=NUM_WARPS,
        **dependent(logits.device),
    )
    best_of_row_kernel[(seqs,)](
        ids,
        last_tokens,
        last_at,
        scores,
        tokens,
        positions,
        slots,
        sampled,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        num_warps=NUM_WARPS,
        **dependent(logits.device),
    )
    return ids
