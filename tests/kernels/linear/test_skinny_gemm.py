"""Products of few rows against PyTorch's, whole and split, and that the choice of a tile is always one that fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional

from pagegraph.kernels.linear import reference
from pagegraph.kernels.linear.tiles import MAX_ROWS, Tile, tile_of


@pytest.mark.parametrize(
    ("rows", "has_bias", "gated"),
    [
        *((rows, False, False) for rows in (1, 2, 7, 16, 33)),
        (1, True, False),
        (33, True, False),
        (1, True, True),
        (33, True, True),
    ],
)
@pytest.mark.parametrize(
    ("out_size", "size", "tile"),
    [
        (96, 64, Tile(32, 64, 1, 4, 3)),
        (40, 128, Tile(16, 32, 2, 4, 3)),  # rows of the weight beyond the last tile
        (64, 160, Tile(16, 64, 2, 4, 3)),  # columns beyond the last
        (32, 192, Tile(16, 64, 8, 4, 3)),  # more splits than columns to share
    ],
)
def test_equals_torch(
    triton_calls, rows: int, out_size: int, size: int, tile: Tile, has_bias: bool, gated: bool
) -> None:
    wide = torch.randn(rows, size + 16, dtype=torch.bfloat16)
    x = wide[:, :size]  # rows that are no neighbours
    weight = torch.randn(out_size, size, dtype=torch.bfloat16)
    bias = torch.randn(out_size, dtype=torch.bfloat16) if has_bias else None
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    expected = reference.silu_mul(expected) if gated else expected
    for _ in range(min(tile.split_k, 2)):  # the second call finds the arrival counts as the first left them
        out, _ = triton_calls.call("pagegraph.kernels.linear.skinny_gemm", "skinny_gemm", x, weight, bias, tile, gated)
        assert out.dtype == x.dtype and out.shape == expected.shape
        torch.testing.assert_close(out.float(), expected, atol=2e-2 * size**0.5, rtol=1e-2)


@example(1, 8, 64)  # fewer weight rows than one tile
@given(st.integers(1, 300), st.integers(1, 5000).map(lambda n: 8 * n), st.integers(1, 2000).map(lambda n: 8 * n))
def test_a_tile_is_chosen_for_few_rows_only(rows: int, out_size: int, size: int) -> None:
    tile = tile_of(rows, out_size, size)
    if tile is None:
        return
    assert rows <= MAX_ROWS
    assert 1 <= tile.split_k <= max(1, size // tile.block_k)
    shared = tile.num_stages * (tile.block_n + 64) * tile.block_k * 2
    assert shared <= 227 * 1024
