"""Products of few rows with quantised weights, gated or not, against the reference."""

from __future__ import annotations

import pytest
import torch

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.quant.tiles import QuantGemvTile
from pagegraph.kernels.quant.weight import QuantWeight
from tests.kernels.quant.weights import multiplied, random_weight, repacked

SHAPES = [
    # kind, N, K, group, tile
    ("int4", 64, 512, 128, QuantGemvTile(1, 4, 1, 3)),
    ("int4", 128, 256, 32, QuantGemvTile(2, 2, 2, 2)),  # two groups a block
    ("int4", 100, 160, 160, QuantGemvTile(2, 2, 1, 3)),  # rows beyond the last block, columns beyond the last step
    ("int4", 64, 320, 64, QuantGemvTile(4, 4, 2, 3)),
    ("int8", 40, 160, 160, QuantGemvTile(1, 4, 1, 3)),
    ("int8", 64, 128, 16, QuantGemvTile(2, 2, 1, 4)),  # four groups a block
    ("int8", 192, 512, 128, QuantGemvTile(4, 8, 1, 3)),
    ("fp8", 44, 160, 160, QuantGemvTile(1, 2, 1, 3)),
    ("fp8", 100, 200, 128, QuantGemvTile(4, 2, 2, 3)),  # the last group is short
    ("fp8", 64, 512, 512, QuantGemvTile(2, 8, 1, 3)),
]


def rows_of(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size + 16, generator=torch.Generator().manual_seed(seed)).bfloat16()[:, :size]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("kind", "out_size", "size", "group", "tile"), SHAPES)
def test_equals_the_reference(
    triton_calls, rows: int, kind: str, out_size: int, size: int, group: int, tile: QuantGemvTile
) -> None:
    has_zero = rows == 3
    qweight, scale, zero = random_weight(kind, out_size, size, group, has_zero and kind != "fp8")
    x, bias = rows_of(rows, size), torch.randn(out_size).bfloat16() if has_zero else None
    expected = x.float() @ multiplied(qweight, scale, zero, group, x.dtype).t() + (0 if bias is None else bias.float())
    weight = repacked(qweight, scale, zero, group, size)
    out, _ = triton_calls.call(
        "pagegraph.kernels.quant.gemv", "quant_gemv", x, QuantWeight(*weight, bias, group, out_size), False, tile
    )
    assert out.dtype == x.dtype and out.shape == expected.shape
    torch.testing.assert_close(out.float(), expected, atol=1e-4 * expected.abs().max().item(), rtol=2**-8)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("out_size", [128, 96, 112])
def test_gate_behind_the_product(triton_calls, kind: str, rows: int, out_size: int) -> None:
    """In the kernel where 16 rows of gate and of up are one program's, else by one of its own; of more rows too."""
    size = 192
    qweight, scale, zero = random_weight(kind, out_size, size, 64, kind == "int4")
    x, bias = rows_of(rows, size)[None] / 16, torch.randn(out_size).bfloat16()
    arguments = [x, *repacked(qweight, scale * 0.1, zero, 64, size), bias, 64, out_size, True, True]
    out, _ = triton_calls.call("pagegraph.kernels.quant.cuda", "repacked_linear", *arguments)
    expected = torch.ops.pagegraph.repacked_linear(*arguments)
    assert out.shape == expected.shape == (1, rows, out_size // 2)
    torch.testing.assert_close(out.float(), expected.float(), atol=2**-7 * expected.abs().max().item(), rtol=2**-6)


def test_what_the_kernel_does_not_take_is_refused(triton_calls) -> None:
    weight = repacked(*random_weight("int8", 64, 128, 128, False), 128, 128)
    for x, gated in ((rows_of(9, 128), False), (rows_of(1, 128).float(), False), (rows_of(1, 128), True)):
        with pytest.raises((ValueError, AssertionError), match="not a GEMV of this kernel"):
            triton_calls.call(
                "pagegraph.kernels.quant.gemv",
                "quant_gemv",
                x,
                QuantWeight(*weight, None, 128, 64),
                gated,
                QuantGemvTile(1, 2, 1, 3),
            )
