"""The Triton kernel that gives a row the same bits in every step: against the reference, and against itself."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.attention import reference
from tests.kernels.attention.cases import Case, check, clone
from tests.kernels.attention.regrouped import rows_one_by_one

CUDA = "pagegraph.kernels.attention.cuda"
RAGGED = ((1, 17), (5, 5), (7, 137), (2, 64))
DECODE = ((1, 1), (1, 100), (1, 200))
CASES = [
    Case(RAGGED, heads=9, kv_heads=3, dtype=torch.bfloat16),
    Case(DECODE, heads=8, kv_heads=1, pad_tokens=1, dtype=torch.bfloat16),
    Case(RAGGED, head_size=48, value_size=32, window=70, sinks=True, softcap=4.0, dtype=torch.bfloat16),
    Case(RAGGED, head_size=128),
    Case(RAGGED, chunk=48, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, strided=True),
    Case((), pad_tokens=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_and_rows_are_the_same_alone(triton_calls, case: Case) -> None:
    """Sections of 64 keys, which are shared out to several programs where a row is alone."""
    expected_arguments = case.arguments()
    expected = reference.paged_attention(*expected_arguments)
    few = {"pagegraph.kernels.attention.fixed.FEW_ROWS": 1, "pagegraph.kernels.attention.fixed.PROGRAMS": 30}

    def attention(*arguments, section: int, constants: dict | None = few) -> torch.Tensor:
        nonlocal given
        out, given = triton_calls.call(CUDA, "paged_attention", *arguments, section, constants=constants)
        return out

    given = clone(expected_arguments)
    out = attention(*given, section=64)
    check(out, given, expected, expected_arguments)
    if case.lengths:
        there = given[:-1]
        alone = rows_one_by_one(attention, there, section=64)
        assert torch.equal(out[: len(alone)], alone)
    shared = attention(
        *clone(expected_arguments), section=64, constants={**few, "pagegraph.kernels.attention.fixed.FEW_ROWS": 64}
    )
    assert torch.equal(shared, out)
