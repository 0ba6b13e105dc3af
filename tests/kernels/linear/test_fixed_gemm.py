"""The GEMM that gives a row the same bits however many rows there are: against PyTorch's, and against itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pagegraph.kernels.linear.fixed_gemm import FEW_ROWS, WIDE, WIDEST, cut_of, parts_of
from pagegraph.kernels.linear.reference import silu_mul
from pagegraph.kernels.linear.tiles import Tile

MODULE = "pagegraph.kernels.linear.fixed_gemm"
SMALL = {f"{MODULE}.LEAST_COLUMNS": 64}  # so that a short product is in parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("out_size", "size", "biased"), [(96, 64, False), (150, 200, True), (40, 300, False)])
def test_rows_are_the_same_alone(triton_calls, dtype: torch.dtype, out_size: int, size: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(140, size + 16, generator=generator).to(dtype)[:, :size]  # rows that are no neighbours
    weight = torch.randn(out_size, size, generator=generator).to(dtype)
    bias = torch.randn(out_size, generator=generator).to(dtype) if biased else None
    whole, _ = triton_calls.call(MODULE, "fixed_linear", x, weight, bias, constants=SMALL)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(whole.float(), expected, atol=tolerance * size**0.5, rtol=tolerance)
    for rows in (slice(0, 1), slice(5, 8), slice(70, 134), slice(0, 65)):
        for _ in range(2):  # the second call finds the arrival counts as the first left them
            part, _ = triton_calls.call(MODULE, "fixed_linear", x[rows], weight, bias, constants=SMALL)
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("out_size", [160, 150])
def test_a_gate_is_that_of_the_product(triton_calls, out_size: int) -> None:
    """In the product's kernel or, where rows cannot be paired, in one of its own."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((9, 64), (out_size, 64), (out_size,))
    )
    product, _ = triton_calls.call(MODULE, "fixed_linear", x, weight, bias)
    gated, _ = triton_calls.call(MODULE, "fixed_linear", x, weight, bias, True)
    torch.testing.assert_close(gated, silu_mul(product), atol=1e-3, rtol=1e-2)


TILES = [(64, 16, 4, 8), (64, 32, 4, 8), (64, 64, 4, 6), *WIDE, WIDEST]


@pytest.mark.parametrize(("out_size", "size", "parts"), [(150, 520, 4), (272, 256, 2), (70, 200, 1)])
def test_every_cut_gives_the_same_bits(triton_calls, out_size: int, size: int, parts: int) -> None:
    """Of any tile, with parts shared out or one after the other; parts that end before the last of their columns too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, size + 8, generator=generator).bfloat16()[:, :size]
    weight = torch.randn(out_size, size, generator=generator).bfloat16()
    found, gated = [], []
    for block_n, block_t, warps, stages in TILES:
        tile = Tile(block_n, 64, parts, warps, stages, block_t)
        for spread in (False, True)[: parts if (block_n, block_t) != WIDEST[:2] or parts == 1 else 0]:
            out, _ = triton_calls.call(MODULE, "fixed_gemm", x, weight, None, tile, spread)
            found.append(out)
            if out_size % 16 == 0:
                out, _ = triton_calls.call(MODULE, "fixed_gemm", x, weight, None, tile, spread, True)
                gated.append(out)
    torch.testing.assert_close(found[0].float(), x.float() @ weight.float().T, atol=0.2, rtol=1e-2)
    assert all(torch.equal(out, found[0]) for out in found)
    assert all(torch.equal(out, gated[0]) for out in gated)
    for out in gated[:1]:
        torch.testing.assert_close(out, silu_mul(found[0]), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("out_size", "size"), [(4096, 1024), (1024, 3072), (151936, 1024), (28672, 4096), (8, 64)])
def test_sums_follow_from_the_weight_alone(out_size: int, size: int, element_size: int) -> None:
    cuts = [cut_of(rows, out_size, size, element_size) for rows in (1, 2, 16, 17, 64, 65, 128, 256, 1024, 8192, 70000)]
    assert {(cut.tile.split_k, cut.tile.block_k) for cut in cuts} == {(parts_of(out_size, size), cuts[0].tile.block_k)}
    assert all(cut.spread == (cut.tile.split_k > 1) for cut in cuts[:5]), FEW_ROWS
    assert not cuts[-1].spread


def test_few_rows_fill_the_multiprocessors() -> None:
    """Of the products of a layer whose hidden size is 1024."""
    for out_size, size in ((4096, 1024), (1024, 2048), (1024, 3072), (6144, 1024)):
        tile, _ = cut_of(1, out_size, size, 2)
        assert 96 <= -(-out_size // tile.block_n) * tile.split_k <= 132
