"""Ops over recurrent state on a CPU against the token by token reference."""

from __future__ import annotations

import pytest
import torch

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.state import reference
from tests.kernels.state.cases import STEPS, Step, compare, conv, delta, scan

ATOL = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
both_dtypes = pytest.mark.parametrize("dtype", ATOL, ids=str)
every_step = pytest.mark.parametrize("name", STEPS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@every_step
@both_dtypes
@pytest.mark.parametrize("bias, width, silu", [(True, 4, True), (False, 3, False)])
def test_causal_conv(name: str, dtype: torch.dtype, bias: bool, width: int, silu: bool) -> None:
    step = Step.of(name)
    compare(
        torch.ops.pagegraph.causal_conv, reference.causal_conv, *conv(step, dtype, bias, width), step, silu,
        atol=ATOL[dtype],
    )  # fmt: skip


@every_step
@both_dtypes
@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta(name: str, dtype: torch.dtype, vector: bool) -> None:
    step = Step.of(name)
    compare(
        torch.ops.pagegraph.gated_delta, reference.gated_delta, *delta(step, dtype, vector), step, True,
        atol=ATOL[dtype],
    )  # fmt: skip


@every_step
@both_dtypes
@pytest.mark.parametrize("mamba1", [False, True])
def test_selective_scan(name: str, dtype: torch.dtype, mamba1: bool) -> None:
    step = Step.of(name)
    compare(
        torch.ops.pagegraph.selective_scan, reference.selective_scan, *scan(step, dtype, mamba1), step, atol=ATOL[dtype]
    )
