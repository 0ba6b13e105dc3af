"""Triton: tokens that a bitmask forbids become -inf in the logits, in place. Knows no grammar."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 4096
NUM_WARPS = 4


@triton.jit
def bitmask_kernel(
    logits_ptr, rows_ptr, bitmask_ptr, row_stride, VOCAB: tl.constexpr, WORDS: tl.constexpr, BLOCK_V: tl.constexpr
):
    index = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = token < VOCAB
    words = tl.load(bitmask_ptr + index.to(tl.int64) * WORDS + token // 32, mask=inside, other=-1)
    forbidden = ((words >> (token % 32)) & 1) == 0
    row = tl.load(rows_ptr + index).to(tl.int64)
    tl.store(logits_ptr + row * row_stride + token, float("-inf"), mask=inside & forbidden)


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """See `kernels.ops`."""
    vocab, words = logits.shape[1], bitmask.shape[1]
    grid = len(rows), triton.cdiv(vocab, BLOCK_V)
    bitmask_kernel[grid](
        logits, rows, bitmask, logits.stride(0), VOCAB=vocab, WORDS=words, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS
    )
