"""Products of integer codes on both sides against their definition: rows as codes, kinds, groups, splits, sizes that do not divide."""

from __future__ import annotations

import pytest
import torch
from quantised_weights import laid, random_weight

from kernels import reference
from kernels.cuda import fragment_linear_by
from kernels.quant_tiles import CODED_GROUP, choice_of, coded
from kernels.skinny_tiles import Tile

SHAPES = [
    # N, K, tile
    (40, 200, Tile(64, 128, 1, 4, 3)),  # rows beyond the last block and tile, columns beyond the last step
    (128, 512, Tile(64, 128, 8, 4, 3, 32)),  # more splits than columns to share
    (192, 384, Tile(128, 128, 2, 8, 3, 128)),  # x in two parts
    (100, 64, Tile(64, 128, 1, 4, 4, 128)),  # less than a step
]


def random_rows(rows: int, size: int) -> torch.Tensor:
    """bfloat16, a slice of wider rows; columns differ as states of a model do."""
    generator = torch.Generator().manual_seed(rows)
    large = torch.rand(size, generator=generator) ** -0.25
    return torch.cat([torch.randn(rows, size, generator=generator) * large, torch.ones(rows, 16)], dim=1).bfloat16()[:, :size]


@pytest.mark.parametrize("size", [64, 200, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_become_the_codes_of_the_reference(triton_calls, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, size, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 0, 3e3])[:, None]).to(dtype)
    (codes, scale), _ = triton_calls.call("kernels.quantize_rows", "code_rows", x, 16)
    assert codes.shape == (16, -(-size // CODED_GROUP) * CODED_GROUP) and scale.shape == (codes.shape[1] // CODED_GROUP, 16)
    expected, expected_scale = reference.coded_rows(x)
    torch.testing.assert_close(scale[:, :5], expected_scale, rtol=1e-6, atol=0)
    # A quotient at the middle of two codes may go either way.
    assert ((codes[:5].int() - expected.int()).abs() <= 1).all() and (codes[:5] == expected).float().mean() > 0.99
    assert not codes[5:].any()


@pytest.mark.parametrize("size", [128, 200])
def test_codes_are_within_half_a_step_of_what_they_stand_for(size: int) -> None:
    x = random_rows(6, size)
    codes, scale = reference.coded_rows(x)
    back = reference.decoded_rows(codes, scale, size)
    step = scale.t().repeat_interleave(CODED_GROUP, dim=1)[:, :size]
    assert ((back - x.float()).abs() <= 0.5001 * step).all()


def test_the_place_of_each_column() -> None:
    """Columns 8 * c + 2 * r + p of 16 at 4 * r + 2 * c + p."""
    codes, _ = reference.coded_rows(torch.arange(128.0)[None] - 0.5)
    expected, _ = reference.quantize_rows(torch.arange(128.0)[None] - 0.5, torch.int8)
    for column in range(128):
        c, r, p = column % 16 // 8, column % 8 // 2, column % 2
        assert codes[0, column // 16 * 16 + 4 * r + 2 * c + p] == expected[0, column]


@pytest.mark.parametrize("rows, dtype, biased", [(1, torch.bfloat16, True), (17, torch.float16, False), (150, torch.bfloat16, True)])
@pytest.mark.parametrize(("out_size", "size", "tile"), SHAPES)
def test_equals_the_product_of_what_the_codes_stand_for(
    triton_calls, rows: int, out_size: int, size: int, tile: Tile, dtype: torch.dtype, biased: bool
) -> None:
    codes, scale, _ = random_weight("int8", out_size, size, size, False)
    x, weight = random_rows(rows, size).to(dtype), codes.float() * scale
    bias = torch.randn(out_size).to(dtype) if biased else None
    added = 0 if bias is None else bias.float()
    laid_codes, laid_scale, _ = laid(codes, scale, None, size, size)
    expected = reference.decoded_rows(*reference.coded_rows(x), size) @ weight.t() + added
    for _ in range(2):  # the second call finds the arrival counts as the first left them
        out, _ = triton_calls.call("kernels.coded_linear", "coded_linear", x, laid_codes, laid_scale, bias, out_size, tile)
        assert out.dtype == x.dtype and out.shape == expected.shape
        # Integers are added up exactly; a code of x that is rounded the other way is a step of many.
        torch.testing.assert_close(out.float(), expected, atol=2e-3 * expected.abs().max().item(), rtol=2**-7)
    exact = x.float() @ weight.t() + added
    assert ((out.float() - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize("tile", [Tile(32, 128, 1, 4, 3), Tile(64, 64, 1, 4, 3), Tile(64, 128, 1, 4, 3, 256)])
def test_tiles_that_do_not_fit_are_refused(triton_calls, tile: Tile) -> None:
    codes, scale, _ = laid(*random_weight("int8", 64, 128, 128, False), 128, 128)
    with pytest.raises((ValueError, AssertionError), match="is not made of blocks of 64 x 128 for up to 128 rows"):
        triton_calls.call("kernels.coded_linear", "coded_linear", torch.zeros(1, 128).bfloat16(), codes, scale, None, 64, tile)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [20, 64, 128, 200, 1000])
def test_products_of_a_model(rows: int) -> None:
    """Large ones, with the rule's tile and some of the table's, again and again: nothing depends on timing."""
    codes, scale, _ = random_weight("int8", 6144, 4096, 4096, False)
    laid_codes, laid_scale, _ = laid(codes, scale, None, 4096, 4096)
    arguments = laid_codes.cuda(), laid_scale.cuda(), None, None, 4096, 6144
    x = random_rows(rows, 4096).cuda()
    expected = x.float() @ (codes.float() * scale).t().cuda()
    for choice in (choice_of("int8", 100, 512, 4096, True), coded(128, 1, 8, 3, 128), coded(64, 2, 4, 4, 64), coded(64, 4, 4, 3, 128)):
        first = fragment_linear_by(choice, x, *arguments)
        assert ((first.float() - expected).norm() / expected.norm()).item() < 0.02
        assert all(torch.equal(first, fragment_linear_by(choice, x, *arguments)) for _ in range(20))
