"""Products of few rows with quantised weights, and what stands around them, against the reference."""

from __future__ import annotations

import pytest
import torch
from quantised_weights import laid, multiplied, random_weight

import kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from kernels import reference
from kernels.quant_tiles import RowsTile

SHAPES = [
    # kind, N, K, group, tile
    ("int4", 64, 512, 128, RowsTile(1, 4, 1, 3)),
    ("int4", 128, 256, 32, RowsTile(2, 2, 2, 2)),  # two groups a block
    ("int4", 100, 160, 160, RowsTile(2, 2, 1, 3)),  # rows beyond the last block, columns beyond the last step
    ("int4", 64, 320, 64, RowsTile(4, 4, 2, 3)),
    ("int8", 40, 160, 160, RowsTile(1, 4, 1, 3)),
    ("int8", 64, 128, 16, RowsTile(2, 2, 1, 4)),  # four groups a block
    ("int8", 192, 512, 128, RowsTile(4, 8, 1, 3)),
    ("fp8", 44, 160, 160, RowsTile(1, 2, 1, 3)),
    ("fp8", 100, 200, 128, RowsTile(4, 2, 2, 3)),  # the last group is short
    ("fp8", 64, 512, 512, RowsTile(2, 8, 1, 3)),
]


def rows_of(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size + 16, generator=torch.Generator().manual_seed(seed)).bfloat16()[:, :size]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("kind", "out_size", "size", "group", "tile"), SHAPES)
def test_equals_the_reference(
    triton_calls, rows: int, kind: str, out_size: int, size: int, group: int, tile: RowsTile
) -> None:
    shifted = rows == 3
    codes, scale, shift = random_weight(kind, out_size, size, group, shifted and kind != "fp8")
    x, bias = rows_of(rows, size), torch.randn(out_size).bfloat16() if shifted else None
    expected = x.float() @ multiplied(codes, scale, shift, group, x.dtype).t() + (0 if bias is None else bias.float())
    weight = laid(codes, scale, shift, group, size)
    (out, *_), _ = triton_calls.call("kernels.fragment_rows", "fragment_rows", x, *weight, bias, group, out_size, tile)
    assert out.dtype == x.dtype and out.shape == expected.shape
    torch.testing.assert_close(out.float(), expected, atol=1e-4 * expected.abs().max().item(), rtol=2**-8)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_between_two_products(triton_calls, kind: str, rows: int, gated: bool) -> None:
    """As kernels of their own do it, but that a norm's result is rounded once and not twice."""
    inner, hidden, out_size = 192, 96, 160
    first, second = random_weight(kind, hidden, inner, inner, False), random_weight(kind, out_size, hidden, 64, kind == "int4")
    first = first[0], first[1] * (1 if kind == "fp8" else 0.02), None
    x, residual, norm = rows_of(rows, inner).contiguous()[None], rows_of(rows, hidden, 1).contiguous()[None], torch.rand(hidden).bfloat16()
    bias = torch.randn(out_size).bfloat16()
    arguments = [
        x, *laid(*first, inner, inner), None, inner, hidden, residual, norm, 1e-5, *laid(*second, 64, hidden), bias, 64, out_size, gated,
    ]  # fmt: skip
    (total, out), _ = triton_calls.call("kernels.cuda", "fragment_linear_norm_linear", *arguments)
    expected_total, expected = torch.ops.pagegraph.fragment_linear_norm_linear(*arguments)
    assert out.shape == expected.shape == (1, rows, out_size // 2 if gated else out_size)
    torch.testing.assert_close(total.float(), expected_total.float(), atol=2**-7 * expected_total.abs().max().item(), rtol=2**-7)
    torch.testing.assert_close(out.float(), expected.float(), atol=2**-6 * expected.abs().max().item(), rtol=2**-6)
    wide = [one.double() if one.is_floating_point() else one for one in (x, residual, norm)]
    exact = wide[0] @ reference.dequantize(*first, inner).double().t() + wide[1]
    torch.testing.assert_close(total.double(), exact, atol=2**-7 * exact.abs().max().item(), rtol=2**-7)


def test_what_the_kernel_does_not_take_is_refused(triton_calls) -> None:
    weight = laid(*random_weight("int8", 64, 128, 128, False), 128, 128)
    for x, gated in ((rows_of(9, 128), False), (rows_of(1, 128).float(), False)):
        with pytest.raises((ValueError, AssertionError), match="not a product of this kernel"):
            triton_calls.call("kernels.fragment_rows", "fragment_rows", x, *weight, None, 128, 64, RowsTile(1, 2, 1, 3), None, None, None, 0.0, gated)
