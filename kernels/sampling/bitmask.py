"""Triton: tokens that a bitmask forbids become -inf in the logits, in place. Knows no grammar."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_W = 64  # words of a program, 2048 tokens
NUM_WARPS = 4


@triton.jit
def bitmask_kernel(
    logits_ptr, rows_ptr, bitmask_ptr, row_stride, VOCAB: tl.constexpr, WORDS: tl.constexpr, BLOCK_W: tl.constexpr
):
    index = tl.program_id(0)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    words = tl.load(bitmask_ptr + index.to(tl.int64) * WORDS + word, mask=word < WORDS, other=-1)
    bit = tl.arange(0, 32)
    forbidden = ((words[:, None] >> bit[None, :]) & 1) == 0
    token = word[:, None] * 32 + bit[None, :]
    row = tl.load(rows_ptr + index).to(tl.int64)
    tl.store(logits_ptr + row * row_stride + token, float("-inf"), mask=forbidden & (token < VOCAB))


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """See `kernels.ops`."""
    vocab, words = logits.shape[1], bitmask.shape[1]
    grid = len(rows), triton.cdiv(words, BLOCK_W)
    bitmask_kernel[grid](
        logits, rows, bitmask, logits.stride(0), VOCAB=vocab, WORDS=words, BLOCK_W=BLOCK_W, num_warps=NUM_WARPS
    )
