"""Tokens that a bitmask forbids: in logits, and sampled anew. Every implementation against the reference."""

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


def sampled_case(vocab: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(arguments of `sample_allowed` for ids sampled from all tokens, what is expected of those written to).

    Row 5 has half of the tokens, row 0 its own token alone but for one, row 3 all, row 1 one, row 4 none of the first parts.
    """
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, vocab, generator=generator).to(dtype)
    temperature = torch.tensor([0.0, 1.0, 0.7, 2.0, 0.0, 1.5])
    seeds, positions = torch.tensor([0, 1, -1, 2**63 - 1, 2**32, 12345678901]), torch.arange(6, dtype=torch.int32) * 7
    slots, sampled = torch.tensor([3, 0, 8, 9, 1, 4]).int(), torch.tensor([1, 1, 1, 1, 0, 1]).int()
    ids = reference.gumbel_argmax(logits, temperature, seeds, positions)
    rows = torch.tensor([5, 0, 3, 1, 4], dtype=torch.int32)
    padded = torch.tensor([*rows, -1, -1], dtype=torch.int32)
    allowed = torch.zeros(7, -(-vocab // 32) * 32, dtype=torch.bool)
    allowed[0, ::2] = True
    allowed[1, [int(ids[0]), (int(ids[0]) + 1) % vocab]] = True
    allowed[2] = True
    allowed[3, vocab - 1] = True
    allowed[4, vocab * 3 // 4 : vocab] = True
    bitmask = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32))
    masked = logits.clone()
    reference.apply_bitmask(masked, rows, bitmask[:5])
    expected = reference.gumbel_argmax(masked, temperature, seeds, positions)
    last, at = torch.full((10,), -7, dtype=torch.int32), torch.full((10,), -7, dtype=torch.int32)
    handed, stands = last.clone(), at.clone()
    anew = [row for row in rows.tolist() if expected[row] != ids[row] and sampled[row]]
    handed[slots[anew].long()], stands[slots[anew].long()] = expected[anew].int(), positions[anew]
    arguments = [ids, padded, bitmask, logits, temperature, seeds, positions, slots, sampled, last, at]
    return arguments, {"ids": expected, "last": handed, "at": stands}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [65, 5000])
def test_forbidden_ids_are_sampled_anew_as_from_allowed_tokens_alone(triton_calls, vocab: int, dtype) -> None:
    arguments, expected = sampled_case(vocab, dtype)
    assert (arguments[0] != expected["ids"]).sum() >= 2 and arguments[0][0] == expected["ids"][0]
    _, after = triton_calls.call("pagegraph.kernels.sampling.allowed", "sample_allowed", *arguments)
    torch.ops.pagegraph.sample_allowed(*arguments)
    for ids, last, at in ((after[0], *after[-2:]), (arguments[0], *arguments[-2:])):
        assert torch.equal(ids, expected["ids"]) and torch.equal(last, expected["last"])
        assert torch.equal(at, expected["at"])


def test_the_op_says_what_it_writes_to() -> None:
    arguments, _ = sampled_case(65, torch.float32)
    torch.library.opcheck(torch.ops.pagegraph.sample_allowed.default, tuple(arguments), test_utils=("test_schema",))
