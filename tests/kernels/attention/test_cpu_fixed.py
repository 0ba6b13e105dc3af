"""Attention with one order of sums on a CPU: against the reference, and bit by bit against itself in other steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.attention import reference
from tests.kernels.attention.cases import Case, check, clone
from tests.kernels.attention.regrouped import rows_one_by_one

RAGGED = ((1, 17), (5, 5), (1, 1), (20, 37), (1, 64), (70, 135))


def compare(case: Case) -> None:
    expected_arguments = case.arguments()
    arguments = clone(expected_arguments)
    expected = reference.paged_attention(*expected_arguments)
    out = torch.ops.pagegraph.paged_attention(*arguments, section=512)
    check(out, arguments, expected, expected_arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1), (40, 1)], ids=str)
def test_shapes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    for size, (block_size, strided) in itertools.product((24, 64, 128), ((16, False), (32, True))):
        compare(Case(RAGGED, *heads, size, block_size=block_size, dtype=dtype, strided=strided))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (1, 0), (7, 0), (70, 0), (1000, 0), (0, 16), (0, 5), (9, 32)])
def test_features(window: int, chunk: int, softcap: float, sinks: bool) -> None:
    for dtype, cache in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float8_e4m3fn)):
        features = dict(window=window, chunk=chunk, softcap=softcap, sinks=sinks, dtype=dtype, cache_dtype=cache)
        compare(Case(RAGGED, 6, 2, 48, 32, **features))


def test_every_value_of_8_bits_is_read_as_pytorch_reads_it() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()]
    case = Case(((1, 1),), 1, 1, len(values), cache_dtype=torch.float8_e4m3fn, pad_tokens=0, pad_seqs=0)
    arguments = list(case.arguments())
    arguments[2] = values.float()[None, None]
    out = torch.ops.pagegraph.paged_attention(*arguments, section=512)
    assert torch.equal(out[0, 0], values.float())


@settings(max_examples=40)
@given(st.data())
def test_a_row_is_the_same_alone(data: st.DataObject) -> None:
    lengths = data.draw(
        st.lists(
            st.tuples(st.integers(1, 80), st.integers(0, 150)).map(lambda one: (one[0], sum(one))),
            min_size=1,
            max_size=4,
        )
    )
    case = Case(
        tuple(lengths), *data.draw(st.sampled_from([(4, 4), (9, 3), (6, 1)])), data.draw(st.sampled_from([24, 64])),
        window=data.draw(st.sampled_from([0, 0, 7, 70])), softcap=data.draw(st.sampled_from([0.0, 4.0])),
        sinks=data.draw(st.booleans()), dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=data.draw(st.integers(0, 1000)),
    )  # fmt: skip
    arguments = case.arguments()
    out = torch.ops.pagegraph.paged_attention(*arguments, section=512)
    alone = rows_one_by_one(torch.ops.pagegraph.paged_attention, arguments, section=512)
    assert torch.equal(out[: len(alone)], alone)
