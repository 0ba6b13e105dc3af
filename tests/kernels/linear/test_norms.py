"""Norm and gated activation, row by row, against plain PyTorch and transformers' own modules."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.linear import reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # a rounding or two of values near 1


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "add"), [((1, 64), True), ((5, 576), False), ((2, 3, 80), True), ((3, 1025), True), ((2, 16384), True)]
)
def test_norm_equals_reference(triton_calls, shape: tuple[int, ...], add: bool, dtype: torch.dtype) -> None:
    x, residual, weight = (
        torch.randn(*shape).to(dtype),
        torch.randn(*shape).to(dtype),
        torch.rand(shape[-1]).to(dtype),
    )
    tolerance = TOLERANCE[dtype]
    if add:
        got, _ = triton_calls.call("pagegraph.kernels.linear.rms_norm", "add_rms_norm", x, residual, weight, 1e-6)
        total, normed = reference.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(got[0], total)
        torch.testing.assert_close(got[1], normed, atol=tolerance, rtol=tolerance)
    else:
        got, _ = triton_calls.call("pagegraph.kernels.linear.rms_norm", "rms_norm", x, weight, 1e-6)
        torch.testing.assert_close(got, reference.rms_norm(x, weight, 1e-6), atol=tolerance, rtol=tolerance)


def test_strided_rows(triton_calls) -> None:
    x = torch.randn(4, 96)[:, ::3]
    got, _ = triton_calls.call("pagegraph.kernels.linear.rms_norm", "rms_norm", x, torch.ones(32), 1e-5)
    torch.testing.assert_close(got, reference.rms_norm(x, torch.ones(32), 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    module.weight.data.normal_()
    x = torch.randn(7, 48).to(dtype)
    assert torch.equal(reference.rms_norm(x, module.weight, 1e-5), module(x))


def test_a_norm_that_rounds_once_is_transformers(triton_calls) -> None:
    """As GPT-OSS's; its weight is held in float32."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    module = GptOssRMSNorm(48, eps=1e-5).bfloat16()
    module.weight.data.normal_()
    x, weight = torch.randn(7, 48).bfloat16(), module.weight.data.float()
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), module(x))
    assert not torch.equal(reference.rms_norm(x, module.weight, 1e-5), module(x))
    got, _ = triton_calls.call("pagegraph.kernels.linear.rms_norm", "rms_norm", x, weight, 1e-5)
    torch.testing.assert_close(got, module(x), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("shape", [(1, 128), (3, 2, 70), (2, 2050)])
def test_silu_equals_reference(triton_calls, shape: tuple[int, ...]) -> None:
    for dtype, tolerance in TOLERANCE.items():
        gate_up = (torch.randn(*shape) * 4).to(dtype)
        got, _ = triton_calls.call("pagegraph.kernels.linear.silu_mul", "silu_mul", gate_up)
        torch.testing.assert_close(got, reference.silu_mul(gate_up), atol=tolerance, rtol=tolerance)
