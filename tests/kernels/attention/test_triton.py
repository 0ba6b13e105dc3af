"""The Triton attention kernels against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from pagegraph.kernels.attention import decode as attention_decode
from pagegraph.kernels.attention import prefill as attention_prefill
from pagegraph.kernels.attention import reference
from pagegraph.kernels.gpu import OTHERS_TAKE
from tests.kernels.attention.cases import Case, check, clone
from tests.kernels.interpreter_process import InterpreterProcess

DECODE = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 100))
RAGGED = ((1, 17), (5, 5), (1, 1), (20, 37), (2, 64), (33, 65))
CASES = [
    Case(),
    Case(lengths=RAGGED, heads=9, kv_heads=3),
    Case(lengths=DECODE, heads=9, kv_heads=3, pad_tokens=2),
    Case(lengths=DECODE, heads=8, kv_heads=1, pad_tokens=0, pad_seqs=0),
    Case(lengths=((1, 1),), pad_tokens=0, pad_seqs=0),
    Case(lengths=RAGGED, head_size=80, block_size=32),
    Case(lengths=DECODE, head_size=96, heads=4, kv_heads=4, pad_tokens=2),
    Case(lengths=RAGGED, head_size=128, heads=8, kv_heads=2, strided=True),
    Case(lengths=((1, 40), (3, 40)), head_size=256, heads=4, kv_heads=1),
    Case(lengths=RAGGED, head_size=48, value_size=32, heads=2, kv_heads=2),
    Case(lengths=RAGGED, window=7),
    Case(lengths=DECODE, window=16, pad_tokens=2),
    Case(lengths=RAGGED, chunk=16),
    Case(lengths=DECODE, chunk=16, pad_tokens=2),
    Case(lengths=RAGGED, softcap=5.0, sinks=True),
    Case(lengths=DECODE, softcap=5.0, sinks=True, window=30, pad_tokens=2),
    Case(lengths=RAGGED, sinks=True, window=9, heads=6, kv_heads=2),
    Case(lengths=((3, 3), (1, 5)), pad_tokens=0, pad_seqs=2),  # a bucket of T = S that is no decode step
    Case(lengths=RAGGED, dtype=torch.bfloat16),
    Case(lengths=DECODE, dtype=torch.float16, pad_tokens=2),
    Case(lengths=RAGGED, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, sinks=True),
    Case(lengths=DECODE, cache_dtype=torch.float8_e4m3fn, pad_tokens=2),
    Case(
        lengths=DECODE,
        cache_dtype=torch.float8_e4m3fn,
        head_size=16,
        value_size=48,
        window=16,
        softcap=5.0,
        pad_tokens=2,
    ),
    Case(lengths=((1, 300), (2, 90)), pad_tokens=1, pad_seqs=2),  # few rows, each split alike
    Case(lengths=((4, 40), (1, 3), (9, 70), (20, 50)), heads=9, kv_heads=3, pad_tokens=2, pad_seqs=40),  # draft tokens
    Case(lengths=((7, 40), (3, 130)), window=20, chunk=32, pad_seqs=12),
    Case(lengths=(), pad_tokens=2, pad_seqs=2),  # nothing but padding: what a graph is captured on
]
# Half of them split in the everyday run, the rest with the slow tests.
SPLIT_CASES = [pytest.param(c, marks=[pytest.mark.slow] if i % 2 else []) for i, c in enumerate(CASES) if c.lengths]
SIZES = list(itertools.product((1, 2, 4), (16, 32, 64, 128, 256)))
SMALL = {
    "pagegraph.kernels.attention.decode.MIN_SHARE": 16,
    "pagegraph.kernels.attention.decode.TILES": {OTHERS_TAKE: dict.fromkeys(SIZES, attention_decode.Tile(16, 4, 2))},
    "pagegraph.kernels.attention.prefill.TILES": {
        OTHERS_TAKE: dict.fromkeys(SIZES, attention_prefill.Tile(16, 16, 4, 2))
    },
}
WIDE = [
    Case(lengths, heads, kv_heads, head_size, block_size=block_size, window=window, softcap=softcap, chunk=chunk, sinks=sinks, pad_tokens=pad)
    for (lengths, pad), (heads, kv_heads), head_size, block_size, (window, softcap, chunk, sinks) in itertools.product(
        [(RAGGED, 3), (DECODE, 2)],
        [(4, 4), (9, 3), (8, 2), (8, 1)],
        [64, 80, 96, 128, 256],
        [16, 32],
        [(0, 0.0, 0, False), (17, 0.0, 0, True), (0, 3.0, 0, False), (0, 0.0, 32, True)],
    )
]  # fmt: skip


FEW_PROGRAMS = {"pagegraph.kernels.attention.decode.SMS": 3}  # for the interpreter, which runs one after the other
ONLY_SHARES = {"pagegraph.kernels.attention.decode.FEW_ROWS": 0, "pagegraph.kernels.attention.decode.MAX_ALIKE": 0}


def compare(triton_calls, case: Case, constants: dict[str, object] | None = None) -> None:
    if isinstance(triton_calls, InterpreterProcess):
        constants = {**FEW_PROGRAMS, **(constants or {})}
    expected_arguments = case.arguments()
    arguments = clone(expected_arguments)
    expected = reference.paged_attention(*expected_arguments)
    out, arguments = triton_calls.call(
        "pagegraph.kernels.attention.cuda", "paged_attention", *arguments, constants=constants
    )
    check(out, arguments, expected, expected_arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(triton_calls, case: Case) -> None:
    compare(triton_calls, case)


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_many_splits_and_small_tiles(triton_calls, case: Case) -> None:
    """Constants so small that a short sequence is split, split again and merged."""
    compare(triton_calls, case, SMALL)


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_equal_shares(triton_calls, case: Case) -> None:
    """Of long sequences, and of short ones as if they were."""
    compare(triton_calls, case, {**SMALL, **ONLY_SHARES})


@pytest.mark.parametrize("cache", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tile", [(16, 4, 2, 1), (128, 4, 3, 1), (64, 4, 4, 64), (16, 2, 3, 64)], ids=str)
def test_sums_after_the_last_tile(triton_calls, cache: torch.dtype | None, tile: tuple[int, ...]) -> None:
    """Other tiles, in whole or split, and weights that are summed up late."""
    lengths = ((1, 17), (1, 1), (1, 130))
    case = Case(lengths, heads=6, head_size=128, sinks=True, pad_tokens=2, dtype=torch.bfloat16, cache_dtype=cache)
    tiles = dict.fromkeys(SIZES, attention_decode.Tile(*tile, sum_late=True))
    compare(
        triton_calls,
        case,
        {
            "pagegraph.kernels.attention.decode.TILES": {OTHERS_TAKE: tiles},
            "pagegraph.kernels.attention.decode.MIN_SHARE": 16,
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_grid(triton_calls, case: Case) -> None:
    compare(triton_calls, case)


def test_queries_beyond_float16(triton_calls) -> None:
    """8-bit blocks are multiplied in float16; what it does not hold is scaled first."""
    case = Case(lengths=DECODE, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, pad_tokens=2)
    query, *rest = case.arguments()
    for times in (1e-6, 1e6):
        expected_arguments = (query * times, *rest[:10], rest[10] / times, *rest[11:])
        arguments = clone(expected_arguments)
        expected = reference.paged_attention(*expected_arguments)
        out, arguments = triton_calls.call("pagegraph.kernels.attention.cuda", "paged_attention", *arguments)
        check(out, arguments, expected, expected_arguments)


def test_a_wrong_window_is_seen(triton_calls) -> None:
    """Negative control: the comparison fails where the kernel computes something else."""
    case = Case(lengths=RAGGED, window=7)
    expected_arguments = case.arguments()
    expected = reference.paged_attention(*expected_arguments)
    arguments = (*clone(expected_arguments)[:12], 8, *expected_arguments[13:])
    out, arguments = triton_calls.call("pagegraph.kernels.attention.cuda", "paged_attention", *arguments)
    with pytest.raises(AssertionError):
        check(out, arguments, expected, expected_arguments)
