"""A router's choice, token by token, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.moe import reference

SIZES = [(1, 128, 8), (7, 32, 4), (3, 60, 6), (5, 512, 10), (4, 4, 2), (2, 8, 1)]  # tokens, experts, choices


def choose(triton_calls, logits: torch.Tensor, *how) -> list[torch.Tensor]:
    got, _ = triton_calls.call("pagegraph.kernels.moe.topk_softmax", "topk_softmax", logits, *how)
    return got


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k"), SIZES)
def test_equals_the_reference(triton_calls, tokens: int, experts: int, k: int, renormalize: bool) -> None:
    """Many logits are equal in bfloat16: the smaller number comes first."""
    for dtype, wanted in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        logits = torch.randn(tokens, experts).to(dtype)
        weights, chosen = choose(triton_calls, logits, k, renormalize, wanted)
        expected, ids = reference.topk_softmax(logits, k, renormalize, wanted)
        assert torch.equal(chosen, ids) and weights.dtype == wanted
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5 if wanted == torch.float32 else 1e-2)


def test_the_reference_is_what_routers_compute() -> None:
    logits = torch.randn(9, 32)
    weights, chosen = reference.topk_softmax(logits, 4, False, torch.float32)
    values, ids = torch.topk(logits.softmax(-1), 4, dim=-1)
    assert torch.equal(chosen, ids)
    torch.testing.assert_close(weights, values)
    shared, _ = reference.topk_softmax(logits, 4, True, torch.float32)
    torch.testing.assert_close(shared, values / values.sum(-1, keepdim=True))


def test_padding_harms_no_other_row(triton_calls) -> None:
    logits = torch.randn(4, 16)
    expected, ids = reference.topk_softmax(logits, 2, True, torch.float32)
    logits[2] = torch.nan
    weights, chosen = choose(triton_calls, logits, 2, True, torch.float32)
    rows = torch.tensor([0, 1, 3])
    assert torch.equal(chosen[rows], ids[rows])
    torch.testing.assert_close(weights[rows], expected[rows])
