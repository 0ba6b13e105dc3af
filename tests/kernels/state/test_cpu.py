"""Ops over recurrent state on a CPU against the token by token reference."""

from __future__ import annotations

import pytest
import torch

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.state import reference
from tests.kernels.state.cases import (
    STEPS,
    Step,
    compare,
    compare_drafted,
    conv,
    delta,
    projected_delta,
    scan,
    scan_of_a_layer,
    with_gates,
)

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
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta(name: str, dtype: torch.dtype, vector: bool, share: int) -> None:
    step = Step.of(name)
    compare(
        torch.ops.pagegraph.gated_delta, reference.gated_delta, *delta(step, dtype, vector, share=share), step, True,
        atol=ATOL[dtype],
    )  # fmt: skip


def test_heads_that_follow_each_other_share_a_key() -> None:
    """As transformers repeats them."""
    step = Step.of("short prompts")
    given, pool = delta(step, torch.float32, False, share=3)

    def repeated(query: torch.Tensor, key: torch.Tensor, *rest) -> torch.Tensor:
        return reference.gated_delta(query.repeat_interleave(3, 1), key.repeat_interleave(3, 1), *rest)

    compare(reference.gated_delta, repeated, given, pool, step, True, atol=0)


@every_step
@both_dtypes
def test_gated_delta_as_projected(name: str, dtype: torch.dtype) -> None:
    step = Step.of(name)
    ops = [with_gates(one, dtype) for one in (torch.ops.pagegraph.gated_delta, reference.gated_delta)]
    compare(*ops, *projected_delta(step, dtype), step, True, atol=ATOL[dtype])


def test_gates_are_those_of_transformers() -> None:
    step = Step.of("short prompts")
    (query, key, value, a, b), pool = projected_delta(step, torch.float32)
    A_log, dt_bias = torch.randn(4), torch.randn(4)
    decay = -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)
    gated = lambda q, k, v, *given: reference.gated_delta(q, k, v, decay, b.sigmoid(), *given[2:])  # noqa: E731
    projected = lambda *given: reference.gated_delta(*given, None, None, A_log, dt_bias)  # noqa: E731
    compare(projected, gated, [query, key, value, a, b], pool, step, True, atol=1e-6)


@every_step
@both_dtypes
@pytest.mark.parametrize("mamba1", [False, True])
def test_selective_scan(name: str, dtype: torch.dtype, mamba1: bool) -> None:
    step = Step.of(name)
    compare(
        torch.ops.pagegraph.selective_scan, reference.selective_scan, *scan(step, dtype, mamba1), step, atol=ATOL[dtype]
    )


# Of a step without draft tokens the reference is what `test_triton` and the tests above compare with.
both_ops = pytest.mark.parametrize("ops", [torch.ops.pagegraph, reference], ids=["op", "reference"])


@both_ops
@both_dtypes
def test_draft_tokens_leave_no_trace_in_a_convolution(ops, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weights = conv(Step.of("decodes"), dtype, True, 4)[0][1:]

    def case(step: Step) -> tuple[list, torch.Tensor]:
        (x, *_), pool = conv(step, dtype, True, 4)
        return [x, *weights], pool

    compare_drafted(ops.causal_conv, reference.causal_conv, case, [0], True, atol=ATOL[dtype])


@both_ops
@both_dtypes
@pytest.mark.parametrize("vector", [False, True])
def test_draft_tokens_leave_no_trace_in_a_delta_rule(ops, dtype: torch.dtype, vector: bool) -> None:
    case = lambda step: delta(step, dtype, vector)  # noqa: E731
    compare_drafted(ops.gated_delta, reference.gated_delta, case, [1, 2, 3, 4], True, atol=ATOL[dtype])


@both_ops
def test_what_is_put_aside_of_a_shared_key_is_that_of_each_head(ops) -> None:
    case = lambda step: delta(step, torch.float32, False, share=2)  # noqa: E731
    wide = 4 * (16 + 24 + 1 + 1)
    compare_drafted(ops.gated_delta, reference.gated_delta, case, [1, 2, 3, 4], True, atol=2e-5, wide=wide)


@both_ops
@both_dtypes
@pytest.mark.parametrize("mamba1", [False, True])
def test_draft_tokens_leave_no_trace_in_a_state_space_model(ops, dtype: torch.dtype, mamba1: bool) -> None:
    case = scan_of_a_layer(dtype, mamba1)

    compare_drafted(ops.selective_scan, reference.selective_scan, case, [0, 1, 3], atol=ATOL[dtype])
