"""Experts of a mixture as Triton kernels against the reference: products of a few tokens, grouped products, their routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.kernels.moe import reference
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.tiles import (
    MAX_GEMV_TOKENS,
    MAX_TRANSPOSED_TOKENS,
    GemvTile,
    GemvTiles,
    GroupedTile,
    GroupedTiles,
    gemv_tiles_of,
    grouped_tiles_of,
)
from tests.kernels.moe.cases import FORMS, GPT_OSS, ROUTINGS, Experts, experts_of

GEMV = GemvTiles(GemvTile(4, 32, 4), GemvTile(8, 16, 4, 2))
GROUPED = GroupedTiles(16, 1, GroupedTile(32, 32, 4, 3), GroupedTile(32, 16, 4, 3))
BOTH = {"gemv": GEMV, "grouped": GROUPED}


def run(triton_calls, tiles: GemvTiles | GroupedTiles, given: Experts, form: Form, programs: int = 3) -> torch.Tensor:
    out, _ = triton_calls.call("pagegraph.kernels.moe.cuda", "experts_by", tiles, *given, form, programs)
    return out


def check(triton_calls, tiles, given: Experts, form: Form, bound: float = 2e-5) -> None:
    expected = reference.experts(*given, *form)
    got = run(triton_calls, tiles, given, form)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.float(), expected.float(), atol=bound, rtol=bound)


@pytest.mark.parametrize(
    ("name", "way", "bias"),
    [(name, way, (at + place) % 2 == 0) for at, name in enumerate(FORMS) for place, way in enumerate(BOTH)],
)
def test_forms(triton_calls, name: str, way: str, bias: bool) -> None:
    """Sizes that fill no tile; each form by one way with biases, by the other without."""
    form = FORMS[name]
    check(triton_calls, BOTH[way], experts_of(5, 2, 8, 40, 20, form=form, bias=bias), form)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("experts", "choices", "tokens"), [(8, 1, 8), (8, 8, 1), (8, 8, 3), (64, 4, 8)])
def test_few_tokens(triton_calls, routing: str, experts: int, choices: int, tokens: int) -> None:
    check(triton_calls, GEMV, experts_of(tokens, choices, experts, 32, 16, routing=routing), Form())


@pytest.mark.parametrize(
    ("choices", "ahead", "live"), [(1, 1, None), (4, 1, 1), (3, 4, 1), (8, 4, None), (6, 4, None), (6, 4, 1)]
)
def test_choices_asked_for_at_once(triton_calls, choices: int, ahead: int, live: int | None) -> None:
    """As many as there are, fewer, or more; none of them of padding."""
    tiles = GEMV._replace(down=GEMV.down._replace(ahead=ahead))
    given = experts_of(3, choices, 8, 40, 20, form=GPT_OSS, bias=True, live=live)
    check(triton_calls, tiles, given, GPT_OSS)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("experts", "choices", "tokens"), [(8, 1, 70), (8, 8, 17), (64, 4, 1), (64, 4, 17)])
def test_many_tokens(triton_calls, routing: str, experts: int, choices: int, tokens: int) -> None:
    check(triton_calls, GROUPED, experts_of(tokens, choices, experts, 32, 16, routing=routing), Form())


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_added(triton_calls, way: str, dtype: torch.dtype) -> None:
    """Rounded as an addition behind the op would."""
    given = experts_of(5, 2, 8, 40, 20, dtype=dtype)
    residual = torch.randn(5, 40).to(dtype)
    alone = run(triton_calls, BOTH[way], given, Form())
    both, _ = triton_calls.call("pagegraph.kernels.moe.cuda", "experts_by", BOTH[way], *given, Form(), 3, residual)
    assert torch.equal(both, alone + residual)
    expected = reference.experts(*given, *Form(), residual=residual)
    torch.testing.assert_close(both, expected, atol=2e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("block_m", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_many_experts(triton_calls, block_m: int) -> None:
    """256 experts of which eight are chosen, 80 tokens."""
    given = experts_of(80, 8, 256, 16, 16)
    tile = GroupedTile(32, 16, 4, 3)
    check(triton_calls, GroupedTiles(block_m, 1, tile, tile), given, Form())


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("form", [Form(), GPT_OSS], ids=["silu", "gpt_oss"])
def test_in_16_bits(triton_calls, way: str, form: Form) -> None:
    given = experts_of(3, 4, 8, form=form, bias=form.transposed, dtype=torch.bfloat16)
    check(triton_calls, BOTH[way], given, form, 4e-2)
    check(triton_calls, BOTH[way], given._replace(weights=given.weights.float()), form, 4e-2)


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("live", [0, 1, 5])
def test_padding_comes_out_as_zeros(triton_calls, way: str, live: int) -> None:
    """Whatever it holds; live rows come out as they do without it."""
    given = experts_of(8, 2, 8, live=live)
    got = run(triton_calls, BOTH[way], given, Form())
    assert not got[live:].any()
    torch.testing.assert_close(got, reference.experts(*given, *Form()), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("way", BOTH)
def test_a_choice_that_is_no_expert_adds_nothing(triton_calls, way: str) -> None:
    given = experts_of(6, 3, 8)
    given.chosen[:, 1] = torch.tensor([8, -1, 100])[torch.arange(6) % 3]
    check(triton_calls, BOTH[way], given, Form())


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("form", [Form(), Form(limit=7.0), Form("relu2", gated=False)], ids=str)
def test_nan_stays_in_its_row(triton_calls, way: str, form: Form) -> None:
    """Limits let it through, which a GPU's minimum and maximum by themselves would not."""
    given = experts_of(6, 2, 4, form=form)
    given.x[2] = torch.nan
    got = run(triton_calls, BOTH[way], given, form)
    assert got[2].isnan().all() and not got[[0, 1, 3, 4, 5]].isnan().any()


def test_one_program_takes_every_tile(triton_calls) -> None:
    given = experts_of(40, 4, 8)
    one, many = (run(triton_calls, GROUPED, given, Form(), programs) for programs in (1, 1000))
    assert torch.equal(one, many)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("live", [None, 0, 33])
@pytest.mark.parametrize("constants", [dict(MAX_BLOCK=128), {}, dict(MANY_PAIRS=0, PART=64, PARTS_AT_ONCE=1)], ids=str)
def test_routes(triton_calls, routing: str, live: int | None, constants: dict[str, int]) -> None:
    """Pairs in the order of a stable sort, each live one in one tile of its expert, empty slots between."""
    given = experts_of(50, 4, 16, routing=routing, live=live)
    chosen = given.chosen
    start = None if live is None else given.query_start[-1:]
    constants = {f"pagegraph.kernels.moe.route.{name}": value for name, value in constants.items()}
    (order, tiles), _ = triton_calls.call(
        "pagegraph.kernels.moe.route", "route", chosen, 16, 16, start, constants=constants
    )
    pairs = 4 * (50 if live is None else live)
    expected = chosen.flatten()[:pairs].sort(stable=True)
    assert torch.equal(order[:pairs], expected.indices.int())
    assert len(tiles) == 4 * 50 // 16 + 16
    rows = []
    for expert, first, last in tiles.tolist():
        if first < last:
            assert last - first <= 16 and (expected.values[first:last] == expert).all()
            rows += range(first, last)
    assert rows == list(range(pairs))


@pytest.mark.parametrize("experts", [1, 9, 40])
def test_many_pairs_are_sorted_as_few(triton_calls, experts: int) -> None:
    """Those of experts that there are, in parts of which the last is not full: more experts than parts too."""
    chosen = torch.randint(-1, experts + 1, (333, 3), generator=torch.Generator().manual_seed(0))
    calls = []
    for constants in ({}, {"MANY_PAIRS": 0, "PART": 128, "PAIRS_AT_ONCE": 16}):
        constants = {f"pagegraph.kernels.moe.route.{name}": value for name, value in constants.items()}
        calls.append(
            triton_calls.call("pagegraph.kernels.moe.route", "route", chosen, experts, 16, None, constants=constants)[0]
        )
    count = int(((chosen >= 0) & (chosen < experts)).sum())
    assert torch.equal(calls[0][0][:count], calls[1][0][:count]) and torch.equal(calls[0][1], calls[1][1])


@given(st.integers(1, 8192), st.integers(1, 8), st.integers(1, 256), st.integers(1, 8192), st.integers(1, 8192))
def test_every_size_has_tiles(tokens: int, choices: int, experts: int, inner: int, hidden: int) -> None:
    for element in (2, 4):
        size = (experts, inner, hidden, element)
        grouped = grouped_tiles_of(tokens * choices, size)
        for tile in (grouped.up, grouped.down):
            columns, depth = tile.block_n, tile.block_k
            assert (grouped.block_m + columns) * depth * element * tile.num_stages <= 232448
        for transposed in (False, True):
            most = MAX_TRANSPOSED_TOKENS if transposed else MAX_GEMV_TOKENS
            assert (gemv_tiles_of(tokens, size, transposed) is None) == (tokens > most)
