"""The CPU implementation, through the op, against the reference: with decode rows in C++, and where that is not built."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.attention import cpu_decode, reference
from tests.kernels.attention.cases import Case, check, clone

RAGGED = ((1, 17), (5, 5), (1, 1), (20, 37), (1, 64), (33, 65))


@pytest.fixture(scope="module", autouse=True, params=["C++", "PyTorch"])
def decode_rows(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu_decode.build()
    kernel = cpu_decode._kernel
    assert kernel is not None
    cpu_decode._kernel = kernel if request.param == "C++" else None
    yield request.param
    cpu_decode._kernel = kernel


def compare(case: Case) -> None:
    expected_arguments = case.arguments()
    arguments = clone(expected_arguments)
    expected = reference.paged_attention(*expected_arguments)
    out = torch.ops.pagegraph.paged_attention(*arguments)
    check(out, arguments, expected, expected_arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_shapes(head_size: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for block_size, strided in itertools.product((16, 32), (False, True)):
        compare(Case(RAGGED, *heads, head_size, block_size=block_size, dtype=dtype, strided=strided))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (1, 0), (7, 0), (16, 0), (1000, 0), (0, 16), (0, 5), (9, 32)])
def test_features(window: int, chunk: int, softcap: float, sinks: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare(Case(RAGGED, 6, 2, 32, window=window, chunk=chunk, softcap=softcap, sinks=sinks, dtype=dtype))
        compare(Case(RAGGED, 6, 2, 48, 32, window=window, chunk=chunk, softcap=softcap, sinks=sinks, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("features", [{}, dict(window=7, sinks=True), dict(chunk=16, softcap=4.0)], ids=str)
def test_an_8_bit_kv_cache(dtype: torch.dtype, features: dict) -> None:
    compare(Case(RAGGED, 6, 2, 32, dtype=dtype, cache_dtype=torch.float8_e4m3fn, **features))


def test_what_8_bits_do_not_hold_is_cut_off() -> None:
    cache = torch.zeros(2, 2, 1, 4).to(torch.float8_e4m3fn)
    heads = torch.tensor([[[1e4, -1e4, 1.0, 0.3]]])
    reference.write_kv(heads, heads, cache, cache.clone(), torch.tensor([3]))
    assert torch.equal(cache[1, 1, 0].float(), torch.tensor([448.0, -448.0, 1.0, 0.3125]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)).map(lambda p: (p[1], sum(p))), max_size=6),
    decodes=st.lists(st.integers(1, 70).map(lambda n: (1, n)), max_size=6),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    features=st.tuples(
        st.sampled_from([0, 1, 13]), st.sampled_from([0.0, 2.0]), st.sampled_from([0, 8]), st.booleans()
    ),
    seed=st.integers(0, 1000),
)
def test_any_ragged_step(lengths, decodes, pads, features, seed) -> None:
    window, softcap, chunk, sinks = features
    mixed = [*lengths, *decodes]
    mixed = tuple(mixed[i] for i in torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed)))
    compare(
        Case(
            mixed, 6, 3, 16, block_size=8, window=window, softcap=softcap, chunk=chunk, sinks=sinks,
            pad_tokens=pads[0], pad_seqs=max(pads[1], 0 if mixed else 1), seed=seed,
        )
    )  # fmt: skip


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (7, 0), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_for_each_token_is_the_sequence_whole(
    dtype: torch.dtype, window: int, chunk: int, softcap: float, sinks: bool
) -> None:
    """Draft tokens: every token of a sequence as a row of its own, over the blocks of the others; with and without padding."""
    lengths = ((3, 17), (1, 40), (5, 5), (1, 1), (3, 33), (1, 2))
    for pad in (0, 2):
        case = Case(
            lengths,
            6,
            2,
            32,
            window=window,
            chunk=chunk,
            softcap=softcap,
            sinks=sinks,
            pad_tokens=pad,
            pad_seqs=pad,
            dtype=dtype,
        )
        expected_arguments = case.arguments()
        arguments = list(clone(expected_arguments))
        expected = reference.paged_attention(*expected_arguments)
        counts = torch.tensor([rows for rows, _ in lengths])
        live = arguments[5][: counts.sum()]
        used = torch.arange(arguments[7].shape[1]) * case.block_size <= live[:, None]
        tables = arguments[7][: len(lengths)].repeat_interleave(counts, dim=0).masked_fill(~used, 0)
        arguments[7] = torch.cat([tables, arguments[7][len(lengths) :]])
        arguments[8] = torch.cat([torch.arange(len(live) + 1), torch.full((pad,), len(live))]).int()
        arguments[9] = torch.cat([live + 1, torch.zeros(pad)]).int()
        check(torch.ops.pagegraph.paged_attention(*arguments), arguments, expected, expected_arguments)


def test_one_graph_with_sizes_left_open() -> None:
    """torch.compile(fullgraph) over other T and S, the mutation of the caches seen by what follows."""
    attention = torch.ops.pagegraph.paged_attention

    def forward(*arguments):
        out = attention(arguments[0] * 1.0, *arguments[1:])
        return out + 1, arguments[3].nan_to_num().sum()

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    counts = []
    for lengths in (((1, 3), (4, 9)), ((1, 20), (1, 2), (7, 7)), ((9, 30), (1, 1), (1, 5), (2, 2))):
        case = Case(lengths)
        expected_arguments = case.arguments()
        arguments = clone(expected_arguments)
        out, total = compiled(*arguments)
        expected, expected_total = forward(*expected_arguments)
        check(out - 1, arguments, expected - 1, expected_arguments)
        torch.testing.assert_close(total, expected_total)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[1] == counts[2], "another size must not compile again"


def test_op_passes_the_library_checks() -> None:
    torch.library.opcheck(
        torch.ops.pagegraph.paged_attention.default,
        tuple(
            a.nan_to_num() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in Case().arguments()
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_row_depends_on_no_other(decode_rows: str) -> None:
    """Bit for bit, whatever else the step holds, above and below the work that one thread does alone."""
    if decode_rows == "PyTorch":
        pytest.skip("its fused attention has no such promise")
    lengths = tuple((1, 60 + 40 * row) for row in range(16))
    arguments = Case(lengths, 9, 3, 64, dtype=torch.bfloat16, pad_tokens=0, pad_seqs=0).arguments()
    whole = torch.ops.pagegraph.paged_attention(*clone(arguments))
    for row in range(16):
        alone = list(clone(arguments))
        for place in (0, 1, 2, 5, 6, 7, 9):
            alone[place] = alone[place][row : row + 1]
        alone[8] = torch.tensor([0, 1], dtype=torch.int32)
        assert torch.equal(torch.ops.pagegraph.paged_attention(*alone)[0], whole[row])
