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


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("heads, size, per_head", [(1, 64, True), (3, 200, True), (4, 24, False), (2, 1100, False)])
@pytest.mark.parametrize(
    "x_dtype, dtype", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), *[(torch.bfloat16,) * 2]]
)
def test_gated_norm_equals_reference(
    triton_calls, heads: int, size: int, per_head: bool, gate_first: bool, x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """A gate is some columns of a wider product."""
    x, wide = torch.randn(5, heads, size).to(x_dtype), torch.randn(5, heads + 1, size + 8).to(dtype)
    gate, weight = wide[:, 1:, 8:], torch.rand(heads * size if per_head else size).to(dtype)
    given = x, gate, weight, 1e-5, gate_first
    got, _ = triton_calls.call("pagegraph.kernels.linear.gated_rms_norm", "gated_rms_norm", *given)
    torch.testing.assert_close(got, reference.gated_rms_norm(*given), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norms_are_transformers(dtype: torch.dtype) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

    ahead, behind = Zamba2RMSNormGated(48, 16, eps=1e-5).to(dtype), Qwen3NextRMSNormGated(16, eps=1e-5).to(dtype)
    x, gate = torch.randn(7, 48).to(dtype), torch.randn(7, 48).to(dtype)
    by_groups = x.view(7, 3, 16), gate.view(7, 3, 16)
    for module, gate_first in ((ahead, True), (behind, False)):
        module.weight.data.normal_()
        expected = module(x, gate) if gate_first else module(*by_groups).flatten(1)
        got = reference.gated_rms_norm(*by_groups, module.weight, 1e-5, gate_first).flatten(1)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(1, 128), (3, 2, 70), (2, 2050)])
def test_silu_equals_reference(triton_calls, shape: tuple[int, ...]) -> None:
    for dtype, tolerance in TOLERANCE.items():
        gate_up = (torch.randn(*shape) * 4).to(dtype)
        got, _ = triton_calls.call("pagegraph.kernels.linear.silu_mul", "silu_mul", gate_up)
        torch.testing.assert_close(got, reference.silu_mul(gate_up), atol=tolerance, rtol=tolerance)
