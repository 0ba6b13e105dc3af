"""Grouped products for Hopper against the reference, on such a GPU alone, for Gluon has no interpreter; sorted rows; when it is chosen."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.gpu import multiprocessors
from pagegraph.kernels.moe import cuda, grouped_gemm_hopper, reference, tiles
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.route import Routes
from pagegraph.kernels.moe.tiles import HopperTiles, hopper_tiles_of
from tests.kernels.moe.cases import FORMS, GPT_OSS, ROUTINGS, Experts, experts_of

BF16 = torch.bfloat16
TAKEN = {name: form for name, form in FORMS.items() if not (form.transposed and form.gated and not form.interleaved)}


def hopper() -> None:
    if not (torch.cuda.is_available() and multiprocessors(torch.device("cuda", 0))):
        pytest.skip("no Hopper GPU")


def there(given: Experts) -> Experts:
    return Experts(*(None if one is None else one.cuda() for one in given))


def check(given: Experts, form: Form, programs: int = 0, stages: int = 4) -> None:
    given = there(given)
    wide = [one.float() if one is not None and one.is_floating_point() else one for one in given]
    expected = reference.experts(*wide, *form)
    poison = torch.full((given.chosen.numel(), 2 * given.x.shape[1]), torch.nan, device="cuda", dtype=given.x.dtype)
    del poison  # its memory is the next results'
    got = cuda.experts_by(HopperTiles(stages), *given, form, programs)
    assert got.dtype == given.x.dtype
    assert (got.float() - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert torch.equal(got, cuda.experts_by(HopperTiles(stages), *given, form, programs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_forms(name: str, bias: bool, dtype: torch.dtype) -> None:
    """Sizes that fill no tile, of rows and of columns."""
    hopper()
    check(experts_of(300, 3, 8, 328, 200, form=TAKEN[name], bias=bias, dtype=dtype), TAKEN[name])


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("experts", "choices"), [(8, 1), (8, 8), (64, 4), (256, 8)])
@pytest.mark.parametrize("tokens", [1, 65, 700])
def test_routings(routing: str, experts: int, choices: int, tokens: int) -> None:
    hopper()
    check(experts_of(tokens, choices, experts, 256, 128, routing=routing, dtype=BF16), Form())


@pytest.mark.gpu
@pytest.mark.parametrize("form", [Form(), GPT_OSS], ids=["silu", "gpt_oss"])
@pytest.mark.parametrize(("inner", "hidden"), [(768, 2048), (2880, 2880), (64, 64)])
def test_sizes(form: Form, inner: int, hidden: int) -> None:
    """Of models; and of one step, so that the producer is as many tiles ahead as it can be."""
    hopper()
    for stages in (3, 4):
        check(experts_of(520, 4, 8, hidden, inner, form=form, bias=True, dtype=BF16), form, stages=stages)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 7])
def test_few_programs_take_every_tile(programs: int) -> None:
    hopper()
    check(experts_of(900, 4, 16, 256, 192, dtype=BF16), Form(), programs)


@pytest.mark.gpu
@pytest.mark.parametrize("live", [0, 1, 400])
def test_padding_comes_out_as_zeros(live: int) -> None:
    """Whatever it holds."""
    hopper()
    given = experts_of(600, 2, 8, 128, 64, live=live, dtype=BF16)
    check(given, Form())
    assert not cuda.experts_by(HopperTiles(), *there(given), Form())[live:].any()


@pytest.mark.gpu
def test_nan_stays_in_its_row() -> None:
    hopper()
    given = experts_of(300, 2, 4, 128, 64, dtype=BF16)
    given.x[2] = torch.nan
    got = cuda.experts_by(HopperTiles(), *there(given), Form())
    assert got[2].isnan().all() and got.isnan().any(dim=1).sum() == 1


@pytest.mark.gpu
def test_a_replayed_graph_reads_new_choices() -> None:
    hopper()
    given = there(experts_of(700, 4, 16, 256, 128, dtype=BF16))
    cuda.experts_by(HopperTiles(), *given, Form())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.experts_by(HopperTiles(), *given, Form())
    for seed, routing in enumerate(ROUTINGS, 1):
        new = there(experts_of(700, 4, 16, 256, 128, routing=routing, dtype=BF16, seed=seed))
        for mine, other in zip(given[:3], new[:3], strict=True):
            mine.copy_(other)
        out.fill_(torch.nan)
        graph.replay()
        expected = reference.experts(*(one if one is None else one.float() for one in given[:1]), given.chosen,
                                     *(one if one is None else one.float() for one in given[2:]), *Form())  # fmt: skip
        assert (out.float() - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("live, slots", [(None, 16), (None, 1024), (0, 16), (33, 1024)])
def test_sorted_rows(triton_calls, routing: str, live: int | None, slots: int) -> None:
    """Rows of live pairs in the order of experts, and tiles without holes, however many slots are looked at at once."""
    given = experts_of(50, 4, 16, hidden=40, routing=routing, live=live)
    start = None if live is None else given.query_start[-1:]
    given.chosen[5, 2] = -1  # no expert
    (order, listed), _ = triton_calls.call("pagegraph.kernels.moe.route", "route", given.chosen, 16, 16, start)
    constants = {"pagegraph.kernels.moe.sorted_rows.SLOTS": slots}
    routes = Routes(order, listed)
    (rows, dense, counts, scales), _ = triton_calls.call(
        "pagegraph.kernels.moe.sorted_rows", "sorted_rows", given.x, routes, 4, constants=constants
    )
    full = listed[listed[:, 1] < listed[:, 2]]
    assert counts.tolist() == [len(full), 0, 0] and scales is None
    assert torch.equal(dense[: len(full)], full)
    pairs = 4 * (50 if live is None else live)
    pairs -= pairs > 22
    assert torch.equal(rows[:pairs], given.x[order[:pairs].long() // 4])


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a mean of rows an expert on, of what the copy engine takes."""
    monkeypatch.setattr(tiles, "HOPPER_ROWS", 64)
    assert hopper_tiles_of(64 * 128, 128) == HopperTiles() and hopper_tiles_of(64 * 128 - 1, 128) is None
    monkeypatch.setattr(grouped_gemm_hopper, "multiprocessors", lambda device: 132)

    def taken(form: Form = Form(), hidden: int = 48, inner: int = 24, dtype: torch.dtype = BF16) -> bool:
        given = experts_of(2, 1, 2, hidden, inner, form=form, dtype=dtype)
        return grouped_gemm_hopper.takes(given.x, given.up, given.down, form)

    assert {name for name, form in FORMS.items() if taken(form)} == set(TAKEN)
    assert taken(dtype=torch.float16) and not taken(dtype=torch.float32)
    assert not taken(hidden=44) and not taken(inner=20)
    monkeypatch.setattr(grouped_gemm_hopper, "multiprocessors", lambda device: 0)
    assert not taken()
