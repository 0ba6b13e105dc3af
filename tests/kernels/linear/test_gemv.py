"""Products of one to four rows with norm, residual, gate and bias, against the plain composition in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.kernels.linear import reference
from pagegraph.kernels.linear.tiles import MAX_SINGLE_ROWS, GemvTile, gemv_tile_of


def plain(x, weight, bias, norm, residual, gated):
    """Float32 throughout."""
    x, weight = x.float(), weight.float()
    if norm is not None:
        x = reference.rms_norm(x, norm.float(), 1e-6)
    out = torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
    out = reference.silu_mul(out) if gated else out
    return out if residual is None else out + residual.float()


PARTS = ("", "norm", "residual", "gated", "bias", "norm gated bias", "residual bias")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [*((rows, parts) for rows in (1, 4) for parts in PARTS), (2, "norm gated bias"), (3, "residual bias")],
)
@pytest.mark.parametrize(
    ("out_size", "size", "tile"),
    [
        (24, 128, GemvTile(4, 64, 1)),
        (20, 200, GemvTile(8, 64, 2)),  # neither rows of the weight nor columns fill the tiles
        (6, 64, GemvTile(1, 256, 4)),  # one tile is wider than the weight
        (12, 192, GemvTile(2, 64, 2, 3)),  # all columns asked for at once
        (20, 200, GemvTile(4, 32, 1, 3)),  # three steps at a time, which do not fill the columns
        (6, 256, GemvTile(2, 64, 1, 2)),  # two, twice
    ],
)
def test_equals_torch(triton_calls, rows: int, out_size: int, size: int, tile: GemvTile, parts: str) -> None:
    bf16, gated = torch.bfloat16, "gated" in parts
    x = torch.randn(rows, size + 8).to(bf16)[:, :size]  # rows that are no neighbours
    weight = torch.randn(out_size, size).to(bf16)
    bias = torch.randn(out_size).to(bf16) if "bias" in parts else None
    norm = torch.rand(size).to(bf16) if "norm" in parts else None
    residual = torch.randn(rows, out_size).to(bf16) if "residual" in parts else None
    expected = plain(x, weight, bias, norm, residual, gated)
    got = run(triton_calls, x, weight, bias, tile, norm, residual, gated)
    assert got.dtype == bf16 and got.shape == expected.shape
    torch.testing.assert_close(got.float(), expected, atol=2e-2 * size**0.5, rtol=1e-2)


def run(triton_calls, x, weight, bias, tile, norm, residual, gated):
    out, _ = triton_calls.call(
        "pagegraph.kernels.linear.gemv", "gemv", x, weight, bias, tile, norm, 1e-6, residual, gated
    )
    return out


def test_a_row_does_not_depend_on_the_others(triton_calls) -> None:
    x, weight = torch.randn(4, 96).bfloat16(), torch.randn(16, 96).bfloat16()
    together = run(triton_calls, x, weight, None, GemvTile(2, 32, 1), None, None, False)
    x[1:] = torch.nan
    alone = run(triton_calls, x, weight, None, GemvTile(2, 32, 1), None, None, False)
    assert torch.equal(together[0], alone[0]) and alone[1:].isnan().all()


@pytest.mark.parametrize("live", [1, 2])
def test_padding_is_left_out(triton_calls, live: int) -> None:
    x, weight, residual = torch.randn(2, 96).bfloat16(), torch.randn(16, 96).bfloat16(), torch.randn(2, 16).bfloat16()
    starts = torch.tensor([0, 1, live], dtype=torch.int32)
    arguments = (x, weight, None, GemvTile(2, 32, 1), None, 1e-6, residual, False)
    every, _ = triton_calls.call("pagegraph.kernels.linear.gemv", "gemv", *arguments)
    some, _ = triton_calls.call("pagegraph.kernels.linear.gemv", "gemv", *arguments, starts)
    assert torch.equal(some[:live], every[:live]) and not some[live:].any()


@given(st.integers(1, 64), st.integers(1, 300000), st.integers(1, 30000), st.booleans())
def test_a_tile_is_chosen_for_aligned_rows_only(rows: int, out_size: int, size: int, gated: bool) -> None:
    tile = gemv_tile_of(rows, out_size, size, gated=gated)
    assert tile is None or (rows <= MAX_SINGLE_ROWS and size % 8 == 0)


@pytest.mark.parametrize(("rows", "live"), [(1, 1), (2, 1), (2, 2), (4, 4), (7, 7)])
def test_the_norm_is_left_for_others(triton_calls, rows: int, live: int) -> None:
    """By the programs of the second product, each a share; of more rows by the norm's own kernel."""
    x, residual = torch.randn(1, rows, 64).bfloat16(), torch.randn(1, rows, 200).bfloat16()
    first, norm, second = torch.randn(200, 64).bfloat16(), torch.rand(200).bfloat16(), torch.randn(6, 200).bfloat16()
    starts = torch.tensor([0, live], dtype=torch.int32)
    arguments = (x, first, None, residual, norm, 1e-6, second, None, False, True, starts)
    got, _ = triton_calls.call("pagegraph.kernels.linear.cuda", "linear_norm_linear", *arguments)
    expected = reference.linear_norm_linear(*arguments)
    for one, other in zip(got, expected):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one[:, :live], other[:, :live], atol=0.4, rtol=2e-2)
    torch.testing.assert_close(got[2][:, :live], reference.rms_norm(got[0], norm, 1e-6)[:, :live], atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_and_a_linear(triton_calls, rows: int, gated: bool) -> None:
    arguments = (
        torch.randn(1, rows, 200).bfloat16(), torch.rand(200).bfloat16(), 1e-6, torch.randn(12, 200).bfloat16(),
        None if gated else torch.randn(12).bfloat16(), gated, torch.tensor([0, rows], dtype=torch.int32),
    )  # fmt: skip
    got, _ = triton_calls.call("pagegraph.kernels.linear.cuda", "norm_linear", *arguments)
    torch.testing.assert_close(got, reference.norm_linear(*arguments), atol=0.4, rtol=2e-2)


def test_three_rows_of_a_large_weight_are_left_to_tensor_cores() -> None:
    """As those of Llama-3-8B, which were measured; of shards of Llama-3-70B, which were not."""
    assert gemv_tile_of(2, 14336, 8192) and not gemv_tile_of(3, 14336, 8192)
    assert not gemv_tile_of(4, 28672, 4096)
    assert gemv_tile_of(4, 2048, 1536)
