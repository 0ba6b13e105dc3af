"""Experts with quantised weights as GPUs multiply them: the reference against that of weights as loaded, the Triton kernels against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.moe import reference
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.tiles import (
    MAX_GEMV_TOKENS,
    GroupedTile,
    GroupedTiles,
    QuantGemvTiles,
    quant_gemv_tiles_of,
    quant_grouped_tiles_of,
)
from pagegraph.kernels.quant.tiles import QuantGemvTile
from tests.kernels.moe.cases import FORMS, KINDS, ROUTINGS, experts_of, quantised_of, repacked_of, stacks_of

TAKEN = [kind for kind in KINDS if kind != "fp8 ragged"]  # whose groups divide into those of blocks
PLAIN = {name: form._replace(transposed=False) for name, form in FORMS.items()}
GEMV = QuantGemvTiles(QuantGemvTile(2, 4, 1, 3), QuantGemvTile(4, 2, 2, 3))
GROUPED = GroupedTiles(16, 1, GroupedTile(64, 64, 4, 3), GroupedTile(128, 128, 4, 3))
BOTH = {"gemv": GEMV, "grouped": GROUPED}
Tiles = QuantGemvTiles | GroupedTiles


def run(triton_calls, tiles: Tiles, repacked: tuple, form: Form, programs: int = 3) -> torch.Tensor:
    stacks = stacks_of(repacked, form)
    out, _ = triton_calls.call("pagegraph.kernels.moe.cuda", "repacked_experts_by", tiles, *stacks, form, programs)
    return out


def check(triton_calls, tiles: Tiles, given: tuple, form: Form) -> None:
    """In bfloat16 against the reference in float32, by the weights that the kernels' rounding gives."""
    repacked = repacked_of(given, form, given[0].dtype)
    wide = [one.float() if isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16 else one for one in repacked]
    expected = reference.repacked_experts(*wide, *form)
    got = run(triton_calls, tiles, repacked, form)
    assert got.dtype == given[0].dtype
    torch.testing.assert_close(got.float(), expected, atol=2e-2 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("name", ["silu", "gpt_oss", "relu2, not gated"])
def test_the_reference_is_that_of_weights_as_loaded(kind: str, name: str) -> None:
    form = PLAIN[name]
    given = quantised_of(experts_of(6, 2, 4, 256, 128, form=form, bias=True, live=5), kind)
    got = torch.ops.pagegraph.repacked_experts(*repacked_of(given, form), *form)
    assert torch.equal(got, reference.quant_experts(*given, *form))


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("way", BOTH)
def test_kinds(triton_calls, kind: str, way: str) -> None:
    form = PLAIN["gpt_oss"]
    given = experts_of(2, 2, 4, 256, 64, form=form, bias=True, dtype=torch.bfloat16)
    check(triton_calls, BOTH[way], quantised_of(given, kind), form)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.bfloat16) for kind in TAKEN), ("int8 row", torch.float16), ("mxfp4", torch.float16)],
)
@pytest.mark.parametrize("way", BOTH)
def test_weights_are_those_of_the_reference_bit_by_bit(triton_calls, kind: str, way: str, dtype: torch.dtype) -> None:
    """Rows of x with a single 1 read a column of the weight each; both products, one expert."""
    form = Form("relu", gated=False)
    given = quantised_of(experts_of(1, 1, 2, 256, 64, form=form, dtype=dtype), kind)
    repacked = repacked_of(given, form, dtype)
    columns = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:10]
    x = torch.eye(256, dtype=dtype)[columns]
    chosen = torch.arange(len(x))[:, None] % 2
    stacks = stacks_of((x, chosen, torch.ones(len(x), 1, dtype=dtype), *repacked[3:]), form)
    if way == "gemv":
        arguments = (x, chosen, stacks[3], None, None, form, GEMV.up)
        inner, _ = triton_calls.call("pagegraph.kernels.moe.quant_gemv", "quant_experts_up", *arguments)
    else:
        routes, _ = triton_calls.call("pagegraph.kernels.moe.route", "route", chosen, 2, 16, None)
        arguments = (x, stacks[3], None, routes, 1, form, True, GROUPED, 3)
        sorted_inner, _ = triton_calls.call(
            "pagegraph.kernels.moe.quant_grouped_gemm", "quant_grouped_gemm", *arguments
        )
        inner = torch.empty_like(sorted_inner)
        inner[routes.order.long()] = sorted_inner
    weight = reference.loaded(stacks[3])
    values = reference.dequantize(*weight[:3], weight.group)
    expected = torch.stack(
        [values[expert, :, column] for expert, column in zip(chosen[:, 0].tolist(), columns.tolist())]
    )
    assert torch.equal(inner, expected.relu().to(dtype))


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh, transposed", "relu2, not gated", "relu, in turn"])
def test_forms(triton_calls, way: str, name: str) -> None:
    """Sizes that fill no block, with biases."""
    form = PLAIN[name]
    given = experts_of(3, 2, 4, 72, 40, form=form, bias=True, dtype=torch.bfloat16)
    check(triton_calls, BOTH[way], quantised_of(given, "int8 row"), form)


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize(
    ("routing", "experts", "choices"),
    [*((routing, 8, 3) for routing in ROUTINGS), ("random", 8, 1), ("random", 12, 10)],
)
def test_routings(triton_calls, way: str, routing: str, experts: int, choices: int) -> None:
    given = experts_of(3, choices, experts, 64, 32, routing=routing, live=2, dtype=torch.bfloat16)
    check(triton_calls, BOTH[way], quantised_of(given, "mxfp4"), Form())


@pytest.mark.parametrize(("parts", "warps"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_tiles_of_few_tokens(triton_calls, parts: int, warps: int) -> None:
    tile = QuantGemvTile(parts, warps, 2, 3)
    given = experts_of(1, 2, 4, 192, 64, dtype=torch.bfloat16)
    check(triton_calls, QuantGemvTiles(tile, tile), quantised_of(given, "int4"), Form())


@pytest.mark.parametrize("block_t", [16, 64])
def test_many_tokens(triton_calls, block_t: int) -> None:
    given = experts_of(70, 2, 4, 64, 32, dtype=torch.bfloat16)
    check(triton_calls, GROUPED._replace(block_m=block_t), quantised_of(given, "int4"), Form())


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("live", [0, 1, 5])
def test_padding_comes_out_as_zeros(triton_calls, way: str, live: int) -> None:
    given = experts_of(6, 2, 4, 64, 32, live=live, dtype=torch.bfloat16)
    given.chosen[0, 1] = -1
    repacked = repacked_of(quantised_of(given, "int8 row"), Form())
    got = run(triton_calls, BOTH[way], repacked, Form())
    assert not got[live:].any() and not got.isnan().any()
    expected = reference.repacked_experts(*repacked, *Form()).float()
    torch.testing.assert_close(got.float(), expected, atol=4e-2, rtol=4e-2)


def test_in_float32(triton_calls) -> None:
    given = experts_of(6, 2, 4, 64, 32)
    repacked = repacked_of(quantised_of(given, "int4"), Form())
    expected = reference.repacked_experts(*repacked, *Form())
    torch.testing.assert_close(run(triton_calls, GROUPED, repacked, Form()), expected, atol=2e-5, rtol=2e-5)


@given(st.integers(1, 8192), st.integers(1, 8), st.integers(1, 256), st.booleans())
def test_every_size_has_tiles(tokens: int, choices: int, experts: int, wide: bool) -> None:
    for kind in ("int4", "int8", "fp8", "mxfp4"):
        tiles = quant_grouped_tiles_of(tokens * choices, (kind, experts, 768, 2048), wide)
        for tile in (tiles.up, tiles.down):
            assert tile.block_n % 64 == 0 and tile.block_k % 64 == 0
        assert (quant_gemv_tiles_of(tokens, (kind, experts, 768, 2048)) is None) == (tokens > MAX_GEMV_TOKENS)
