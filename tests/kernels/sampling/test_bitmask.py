"""Tokens that a bitmask forbids become -inf in place: every implementation against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagegraph.kernels import ops  # noqa: F401  ops registers torch.ops.pagegraph
from pagegraph.kernels.sampling import reference


def case(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [6, vocab], rows, bitmask): of rows 5, 0 and 3, one of them without a token, one with all."""
    generator = np.random.default_rng(vocab)
    bitmask = generator.integers(-(2**31), 2**31, (3, -(-vocab // 32)), np.int64).astype(np.int32)
    bitmask[1], bitmask[2] = 0, -1
    logits = torch.from_numpy(generator.standard_normal((6, vocab), np.float32)).to(dtype)
    return logits, torch.tensor([5, 0, 3], dtype=torch.int32), torch.from_numpy(bitmask)


def bit_by_bit(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    expected = logits.clone()
    for row, words in zip(rows.tolist(), bitmask.tolist(), strict=True):
        for token in range(logits.shape[1]):
            if not words[token // 32] >> token % 32 & 1:
                expected[row, token] = -torch.inf
    return expected


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_the_reference_and_the_cpu(vocab: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, rows, bitmask = case(vocab, dtype)
        expected = bit_by_bit(logits, rows, bitmask)
        specified = logits.clone()
        reference.apply_bitmask(specified, rows, bitmask)
        assert torch.equal(specified, expected)
        torch.ops.pagegraph.apply_bitmask(logits, rows, bitmask)
        assert torch.equal(logits, expected)


def test_the_op_says_that_it_writes_to_the_logits() -> None:
    torch.library.opcheck(
        torch.ops.pagegraph.apply_bitmask.default, case(100, torch.float32), test_utils=("test_schema",)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel(triton_calls, dtype: torch.dtype) -> None:
    for vocab in (31, 5000):
        logits, rows, bitmask = case(vocab, dtype)
        expected = logits.clone()
        reference.apply_bitmask(expected, rows, bitmask)
        _, after = triton_calls.call("pagegraph.kernels.sampling.bitmask", "apply_bitmask", logits, rows, bitmask)
        assert torch.equal(after[0], expected)
