"""Experts whose rows are rounded to e4m3 as their weights are: the products for Hopper on such a GPU alone, what they are given anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.gpu import multiprocessors
from pagegraph.kernels.moe import cuda, grouped_gemm_hopper, reference, tiles
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.route import Routes
from pagegraph.kernels.moe.tiles import HopperTiles, e4m3_tiles_of
from pagegraph.kernels.quant.reference import dequantize, exchanged_columns, quantize_rows, restored_columns
from tests.kernels.moe.cases import FORMS, ROUTINGS, experts_of, quantised_of, repacked_of, stacks_of

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
TILES = {"wide": HopperTiles(), "narrow": HopperTiles(6, 128), "three stages": HopperTiles(3)}
PLAIN = {name: form._replace(transposed=False) for name, form in FORMS.items()}
# Of the norm of the result. Sums of fewer bits and in another order, and the roundings to e4m3 that they tip over:
TIGHT = 0.02
ROUNDED = 0.06  # e4m3 has 3 bits behind the point, and rows are rounded twice


def rounded_rows(x: Tensor) -> Tensor:
    """x [.., K] as e4m3 with one scale a row holds it, float32."""
    x_q, scale = quantize_rows(x, E4M3)
    return x_q.float() * scale


def expected_of(stacks: tuple[Any, ...], form: Form, rounds: bool = True) -> Tensor:
    """float32 [T, H] by the weights as loaded, with roundings between kernels; rounds: and rows to e4m3."""
    x, chosen, weights, up, _, down, _, query_start = stacks
    form = form._replace(interleaved=False, transposed=False)
    wide = []
    for stack in (up, down):
        held = reference.loaded(stack)
        wide.append(dequantize(*held[:3], held.group))
    first = reference.from_eights(wide[0]) if form.gated else wide[0]
    out = torch.zeros_like(x, dtype=torch.float32)
    live = reference.live_rows(chosen, query_start)[:, None]
    rounded = rounded_rows if rounds else Tensor.float
    for expert in range(len(first)):
        token, choice = torch.where((chosen == expert) & live)
        product = (rounded(x[token]) @ first[expert].T).to(x.dtype).float()
        inner = reference.between(product, form).to(x.dtype)
        rows = (rounded(inner) @ wide[1][expert].T).to(x.dtype).float()
        out.index_add_(0, token, rows * weights[token, choice, None].float())
    return out


def hopper() -> None:
    if not (torch.cuda.is_available() and multiprocessors(torch.device("cuda", 0))):
        pytest.skip("no Hopper GPU")


def stacked(form: Form = Form(), tensor_scales: bool = False, **sizes: Any) -> tuple[Any, ...]:
    """Arguments of the launcher, of e4m3 with a scale a row; tensor_scales: the same for all rows of an expert."""
    dtype = sizes.pop("dtype", BF16)
    given = list(quantised_of(experts_of(**sizes, form=form, dtype=dtype), "fp8 row"))
    if tensor_scales:
        for at in (3, 8):
            wide = given[at].float() * given[at + 1]
            scale = (wide.abs().amax(dim=(1, 2), keepdim=True) / 448).expand_as(given[at + 1]).contiguous()
            given[at], given[at + 1] = (wide / scale).to(E4M3), scale
    return stacks_of(repacked_of(tuple(given), form, dtype), form)


def there(stacks: tuple[Any, ...]) -> tuple[Any, ...]:
    def moved(one: Any) -> Any:
        if isinstance(one, Tensor):
            return one.cuda()
        return type(one)(*map(moved, one)) if isinstance(one, tuple) else one

    return tuple(map(moved, stacks))


def check(stacks: tuple[Any, ...], form: Form = Form(), way: HopperTiles = TILES["wide"], programs: int = 0) -> None:
    stacks = there(stacks)
    x, chosen = stacks[:2]
    expected, unrounded = expected_of(stacks, form), expected_of(stacks, form, rounds=False)
    poison = torch.full((chosen.numel(), 2 * x.shape[1]), torch.nan, device="cuda", dtype=x.dtype)
    del poison  # its memory is the next results'
    got = cuda.repacked_experts_by(way, *stacks, form, programs)
    assert got.dtype == x.dtype
    assert (got.float() - expected).norm() <= TIGHT * expected.norm()
    assert (got.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    assert (got.float() - unrounded).norm() <= ROUNDED * unrounded.norm()
    assert torch.equal(got, cuda.repacked_experts_by(way, *stacks, form, programs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", TILES)
@pytest.mark.parametrize("name", PLAIN)
def test_forms(name: str, way: str, dtype: torch.dtype) -> None:
    """Sizes that fill no tile, of rows and of columns, and weights that fill no block."""
    hopper()
    sizes: dict[str, Any] = {"tokens": 300, "choices": 3, "experts": 8, "hidden": 328, "inner": 200, "dtype": dtype}
    check(stacked(PLAIN[name], **sizes), PLAIN[name], TILES[way])


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("experts", "choices"), [(8, 1), (8, 8), (64, 4), (128, 8)])
@pytest.mark.parametrize("tokens", [16, 65, 700, 2048])
def test_routings(routing: str, experts: int, choices: int, tokens: int) -> None:
    hopper()
    check(stacked(tokens=tokens, choices=choices, experts=experts, hidden=256, inner=128, routing=routing))


@pytest.mark.gpu
@pytest.mark.parametrize("way", TILES)
@pytest.mark.parametrize("tensor_scales", [False, True])
@pytest.mark.parametrize(("inner", "hidden"), [(768, 2048), (704, 1536), (64, 64)])
@pytest.mark.parametrize("tokens", [17, 520])
def test_sizes(tokens: int, inner: int, hidden: int, tensor_scales: bool, way: str) -> None:
    """Of models; one whose columns fill no step; and one of a single step, so that the producer is far ahead."""
    hopper()
    sizes: dict[str, Any] = {"tokens": tokens, "choices": 4, "experts": 8, "hidden": hidden, "inner": inner}
    check(stacked(tensor_scales=tensor_scales, **sizes), way=TILES[way])


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 7])
def test_few_programs_take_every_tile(programs: int) -> None:
    hopper()
    check(stacked(tokens=900, choices=4, experts=16, hidden=256, inner=192), programs=programs)


@pytest.mark.gpu
@pytest.mark.parametrize("live", [0, 1, 17, 400])
def test_padding_comes_out_as_zeros(live: int) -> None:
    """Whatever it holds."""
    hopper()
    stacks = stacked(tokens=600, choices=2, experts=8, hidden=128, inner=64, live=live)
    check(stacks)
    assert not cuda.repacked_experts_by(HopperTiles(), *there(stacks), Form())[live:].any()


@pytest.mark.gpu
def test_a_token_that_holds_nan_comes_out_as_nan() -> None:
    """And leaves those that chose the same experts as they are."""
    hopper()
    stacks = there(stacked(tokens=200, choices=2, experts=4, hidden=256, inner=128))
    expected = cuda.repacked_experts_by(HopperTiles(), *stacks, Form())
    stacks[0][77, 5] = torch.nan
    got = cuda.repacked_experts_by(HopperTiles(), *stacks, Form())
    assert got[77].isnan().all()
    others = torch.arange(200, device="cuda") != 77
    assert torch.equal(got[others], expected[others])


@pytest.mark.gpu
def test_a_replayed_graph_reads_new_choices() -> None:
    hopper()
    sizes: dict[str, Any] = {"tokens": 700, "choices": 4, "experts": 16, "hidden": 256, "inner": 128}
    stacks = there(stacked(**sizes))
    cuda.repacked_experts_by(HopperTiles(), *stacks, Form())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.repacked_experts_by(HopperTiles(), *stacks, Form())
    for seed, routing in enumerate(ROUTINGS, 1):
        for mine, other in zip(stacks[:3], there(stacked(routing=routing, seed=seed, **sizes))[:3], strict=True):
            mine.copy_(other)
        out.fill_(torch.nan)
        graph.replay()
        expected = expected_of(stacks, Form())
        assert (out.float() - expected).norm() <= TIGHT * expected.norm()


@pytest.mark.parametrize("routing, live", [*((one, 33) for one in ROUTINGS), ("random", None), ("random", 0)])
def test_sorted_rows_have_their_scales(triton_calls, routing: str, live: int | None) -> None:
    """Those of the reference, each token's rounded once, in the order of experts; columns in the order of the weights."""
    given = experts_of(50, 4, 16, hidden=200, routing=routing, live=live, dtype=BF16)
    start = None if live is None else given.query_start[-1:]
    (order, listed), _ = triton_calls.call("pagegraph.kernels.moe.route", "route", given.chosen, 16, 16, start)
    (x_q, scale), _ = triton_calls.call("pagegraph.kernels.quant.activations", "exchanged_e4m3_rows", given.x)
    of, _ = triton_calls.call("pagegraph.kernels.moe.sorted_rows", "sorted_rows", x_q, Routes(order, listed), 4, scale)
    pairs = 4 * (50 if live is None else live)
    token = order[:pairs].long() // 4
    wanted, wanted_scale = quantize_rows(given.x, E4M3)
    assert of.rows.dtype == E4M3 and of.rows.shape == (200, 256)
    assert torch.equal(of.scales[:pairs], scale[token, 0])
    torch.testing.assert_close(of.scales[:pairs], wanted_scale[token, 0], rtol=1e-6, atol=0)  # GPUs divide less exactly
    assert torch.equal(of.rows[:pairs].view(torch.uint8), x_q[token].view(torch.uint8))
    off = of.rows[:pairs].float() - exchanged_columns(wanted.float())[token]
    assert (off != 0).sum() <= 0.01 * off.numel()  # it multiplies by the inverse of a scale, which tips few over


@pytest.mark.parametrize("name", ["silu", "relu2, not gated"])
def test_rows_meet_the_columns_of_weights(triton_calls, name: str) -> None:
    """What the products are given, multiplied as it lies: gate and up in eights, columns exchanged on both sides."""
    form = PLAIN[name]
    x, chosen, _, up, *_ = stacked(form, tokens=20, choices=1, experts=1, hidden=200, inner=72)
    (x_q, scale), _ = triton_calls.call("pagegraph.kernels.quant.activations", "exchanged_e4m3_rows", x)
    assert up.has_e4m3_rows and up.qweight.shape[2] == x_q.shape[1] == 256 and up.scale.is_contiguous()
    got = x_q.float() @ up.qweight[0, : up.rows].float().T * scale * up.scale[0, : up.rows].T
    held = reference.loaded(up)
    expected = (restored_columns(x_q.float(), 200) * scale) @ dequantize(*held[:3], held.group)[0].T
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    if form.gated:  # as the kernel splits them
        gate, up_rows = got.reshape(20, -1, 2, 8).permute(0, 1, 3, 2).unbind(-1)
        halves = torch.cat([gate.reshape(20, -1), up_rows.reshape(20, -1)], dim=1)
        assert torch.equal(halves, reference.from_eights(got.T[None])[0].T)


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With e4m3 of one scale a row, in 16 bits, without biases, from some pairs on, where few tokens' products end."""
    monkeypatch.setattr(tiles, "E4M3_PAIRS", 100)
    assert e4m3_tiles_of(100) == HopperTiles() and e4m3_tiles_of(99) is None
    monkeypatch.setattr(grouped_gemm_hopper, "multiprocessors", lambda device: 132)

    def taken(kind: str = "fp8 row", dtype: torch.dtype = BF16, bias: bool = False) -> bool:
        given = experts_of(2, 1, 2, 256, 128, bias=bias, dtype=dtype)
        x, _, _, up, up_bias, down, down_bias, _ = stacks_of(repacked_of(quantised_of(given, kind), Form()), Form())
        return grouped_gemm_hopper.takes_e4m3(x, up, up_bias, down, down_bias)

    assert taken() and taken(dtype=torch.float16)
    assert not taken(dtype=torch.float32) and not taken(bias=True)
    assert not any(taken(kind) for kind in ("fp8 block", "int8 row", "int4 row", "mxfp4"))
    monkeypatch.setattr(grouped_gemm_hopper, "multiprocessors", lambda device: 0)
    assert not taken()


def test_the_op_takes_what_it_may_round() -> None:
    """As a step is traced, and on a CPU, where nothing is rounded."""
    repacked = repacked_of(quantised_of(experts_of(20, 2, 4, 64, 32, dtype=BF16), "fp8 row"), Form(), BF16)
    plain = torch.ops.pagegraph.repacked_experts(*repacked, *Form())
    assert torch.equal(torch.ops.pagegraph.repacked_experts(*repacked, *Form(), quantize_x=True), plain)
    meta = [one.to("meta") if isinstance(one, Tensor) else one for one in repacked]
    assert torch.ops.pagegraph.repacked_experts(*meta, *Form(), quantize_x=True).shape == plain.shape


@pytest.mark.parametrize(("quantize_x", "tokens", "expected"), [(True, 9, HopperTiles), (False, 9, tiles.GroupedTiles),
                                                                (True, 8, tiles.QuantGemvTiles)])  # fmt: skip
def test_what_an_op_launches(monkeypatch: pytest.MonkeyPatch, quantize_x: bool, tokens: int, expected: type) -> None:
    """Few tokens keep their rows, and others where they are not to be rounded."""
    asked: list[Any] = []
    monkeypatch.setattr(grouped_gemm_hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda, "repacked_experts_by", lambda way, x, *others: asked.append(way) or x)
    given = quantised_of(experts_of(tokens, 8, 8, 256, 128, dtype=BF16), "fp8 row")
    cuda.repacked_experts(*repacked_of(given, Form(), BF16), *Form(), quantize_x=quantize_x)
    assert isinstance(asked[0], expected)
