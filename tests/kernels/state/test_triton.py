"""Triton kernels over recurrent state against the token by token reference."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.state import reference
from tests.kernels.state.cases import Step, compare, conv, delta, scan

ATOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
both_dtypes = pytest.mark.parametrize("dtype", ATOL, ids=str)
every_step = pytest.mark.parametrize("name", ["short prompts", "decodes"])  # the interpreter takes its time


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def on_device(triton_calls, module: str, function: str):
    """The launcher as an op: what it mutates is copied back."""

    def call(*arguments):
        out, after = triton_calls.call(f"pagegraph.kernels.state.{module}", function, *arguments)
        for given, changed in zip(arguments, after):
            if isinstance(given, torch.Tensor):
                given.copy_(changed)
        return out

    return call


@every_step
@both_dtypes
@pytest.mark.parametrize("bias, width, silu", [(True, 4, True), (False, 3, False)])
def test_causal_conv(triton_calls, name: str, dtype: torch.dtype, bias: bool, width: int, silu: bool) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "conv", "causal_conv")
    compare(op, reference.causal_conv, *conv(step, dtype, bias, width), step, silu, atol=ATOL[dtype])


@every_step
@both_dtypes
@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta(triton_calls, name: str, dtype: torch.dtype, vector: bool) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "delta", "gated_delta")
    compare(op, reference.gated_delta, *delta(step, dtype, vector), step, True, atol=ATOL[dtype])


@every_step
@both_dtypes
@pytest.mark.parametrize("mamba1", [False, True])
def test_selective_scan(triton_calls, name: str, dtype: torch.dtype, mamba1: bool) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "scan", "selective_scan")
    compare(op, reference.selective_scan, *scan(step, dtype, mamba1), step, atol=ATOL[dtype])
