"""Products of codes on both sides against their definition: rows as codes, kinds, groups, splits, sizes that do not divide."""

from __future__ import annotations

import pytest
import torch

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.linear import reference as linear_reference
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.quant import reference as quant_reference
from pagegraph.kernels.quant.activations import Norm
from pagegraph.kernels.quant.cuda import repacked_linear_by
from pagegraph.kernels.quant.tiles import ACTIVATION_GROUP, by_gemm_8bit, choice_of
from pagegraph.kernels.quant.weight import QuantWeight
from tests.kernels.quant.weights import random_weight, repacked

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
    return torch.cat([torch.randn(rows, size, generator=generator) * large, torch.ones(rows, 16)], dim=1).bfloat16()[
        :, :size
    ]


@pytest.mark.parametrize("size", [64, 200, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_become_the_codes_of_the_reference(triton_calls, size: int, dtype: torch.dtype) -> None:
    x = (
        torch.randn(5, size, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 0, 3e3])[:, None]
    ).to(dtype)
    (qweight, scale), _ = triton_calls.call("pagegraph.kernels.quant.activations", "int8_rows", x, 16)
    assert qweight.shape == (16, -(-size // ACTIVATION_GROUP) * ACTIVATION_GROUP) and scale.shape == (
        qweight.shape[1] // ACTIVATION_GROUP,
        16,
    )
    expected, expected_scale = quant_reference.int8_rows(x)
    torch.testing.assert_close(scale[:, :5], expected_scale, rtol=1e-6, atol=0)
    # A quotient at the middle of two codes may go either way.
    assert ((qweight[:5].int() - expected.int()).abs() <= 1).all() and (qweight[:5] == expected).float().mean() > 0.99
    assert not qweight[5:].any()


@pytest.mark.parametrize("size", [64, 200, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_become_the_floats_of_the_reference(triton_calls, size: int, dtype: torch.dtype) -> None:
    x = (
        torch.randn(5, size, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 0, 3e3])[:, None]
    ).to(dtype)
    (qweight, scale, sums), _ = triton_calls.call("pagegraph.kernels.quant.activations", "e4m3_rows", x, 16)
    assert (
        qweight.shape == (16, -(-size // ACTIVATION_GROUP) * ACTIVATION_GROUP)
        and scale.shape == (16,)
        and sums.shape == (qweight.shape[1] // ACTIVATION_GROUP, 16)
    )
    expected, expected_scale, _ = quant_reference.e4m3_rows(x)
    torch.testing.assert_close(scale[:5], expected_scale, rtol=1e-6, atol=0)
    check_floats(qweight[:5], expected)
    assert not qweight[5:].float().any() and not sums[:, 5:].any()
    # Codes below 2**-6 have fewer bits than those that are added up.
    added = qweight.float().view(16, -1, ACTIVATION_GROUP).sum(2).t()
    torch.testing.assert_close(sums, added, rtol=1e-5, atol=ACTIVATION_GROUP * 2**-10)


def check_floats(qweight: torch.Tensor, expected: torch.Tensor) -> None:
    """A quotient at the middle of two codes may go either way: at most a step of the type."""
    step = expected.float().abs().clamp(min=2**-6) * 2**-3
    assert ((qweight.float() - expected.float()).abs() <= step).all()
    assert (qweight.float() == expected.float()).float().mean() > 0.99


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", ["int8_rows", "e4m3_rows", "exchanged_e4m3_rows"])
def test_the_scale_of_what_holds_nan_is_nan(triton_calls, function: str, gated: bool) -> None:
    """As the reference's, so that what is multiplied by it is NaN whatever 8 bits hold; other rows, and groups of int8, are as without."""

    def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        multiple = () if function.startswith("exchanged") else (16,)
        found, _ = triton_calls.call("pagegraph.kernels.quant.activations", function, x, *multiple, None, gated)
        return found[0], found[1]

    clean = random_rows(4, 400 if gated else 200).contiguous()
    x = clean.clone()
    x[1, 130], x[3, 5] = torch.nan, -torch.nan
    x_q, scale = rounded(x)
    expected_q, expected = rounded(clean)
    reference = quant_reference.int8_rows if function == "int8_rows" else quant_reference.e4m3_rows
    wanted = reference(linear_reference.silu_mul(x) if gated else x)[1].isnan()
    assert 0 < wanted.sum() < wanted.numel() and torch.equal(scale[..., :4].isnan().flatten(), wanted.flatten())
    assert torch.equal(torch.where(scale.isnan(), expected, scale), expected)
    assert torch.equal(x_q[::2].float(), expected_q[::2].float())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_that_holds_nan_comes_out_as_nan(triton_calls, kind: str) -> None:
    """And leaves the others as they are."""
    group = 256 if kind == "int8" else 128
    qweight, scale, zero = random_weight(kind, 128, 256, group, kind == "int4")
    weight = QuantWeight(*repacked(qweight, scale, zero, group, 256), None, group, 128)
    clean = random_rows(5, 256)
    x = clean.clone()
    x[3, 200] = torch.nan

    def multiplied(rows: torch.Tensor) -> torch.Tensor:
        tile = Tile(64, 128, 1, 4, 3)
        return triton_calls.call("pagegraph.kernels.quant.gemm_8bit", "gemm_8bit", rows, weight, tile)[0]

    out, expected = multiplied(x), multiplied(clean)
    assert out[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("size", [200, 3000])
@pytest.mark.parametrize("function", ["int8_rows", "e4m3_rows", "exchanged_e4m3_rows"])
def test_what_is_ahead_of_the_rounding(triton_calls, function: str, size: int) -> None:
    """A norm with the addition before it, or a gate, as by a kernel of its own."""

    def rounded(x: torch.Tensor, *ahead: object) -> tuple[list[torch.Tensor], tuple]:
        multiple = () if function.startswith("exchanged") else (16,)
        found, given = triton_calls.call("pagegraph.kernels.quant.activations", function, x, *multiple, *ahead)
        return [one.float() for one in found], given

    x, weight = random_rows(5, size), torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16()
    residual = random_rows(6, size)[:5].contiguous()
    total, normed = linear_reference.add_rms_norm(x, residual, weight, 1e-6)
    found, given = rounded(x, Norm(weight, 1e-6, residual, torch.empty(5, size, dtype=torch.bfloat16)))
    assert torch.equal(given[-1].total, total)
    gate_up = random_rows(5, 2 * size)
    for one, plain in ((found, normed), (rounded(gate_up, None, True)[0], linear_reference.silu_mul(gate_up))):
        qweight, scale, *_ = one
        expected, expected_scale, *_ = rounded(plain)[0]
        # A mean in another order of additions, or another exponential, moves few values by a step of bfloat16.
        torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)
        assert (qweight == expected).float().mean() > 0.97 and (qweight - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    "kind, second_group, rows, gated",
    [
        pytest.param(*weight, rows, gated, marks=[] if (at + few + gated) % 2 else [pytest.mark.slow])
        for at, weight in enumerate([("int8", 256), ("int4", 128), ("int4", 64), ("fp8", 256)])
        for few, rows in enumerate([3, 20, 70])
        for gated in (False, True)
    ],
)
def test_norm_and_gate_ahead_of_products(triton_calls, kind: str, second_group: int, rows: int, gated: bool) -> None:
    """By each way of few, some and many rows, as one op after the other; rows of int4 in groups of 64 are not rounded."""
    size, inner, out_size = 128, 256, 128
    width = 2 * inner if gated else inner
    x, residual, norm = (
        random_rows(rows, size)[None],
        random_rows(rows + 1, size)[None, :rows],
        torch.rand(size).bfloat16(),
    )

    def weight(outputs: int, inputs: int, group: int) -> list:
        return [
            *repacked(*random_weight(kind, outputs, inputs, group, kind == "int4"), group, inputs),
            torch.randn(outputs).bfloat16(),
            group,
            outputs,
        ]

    first, second = weight(width, size, 128), weight(out_size, inner, second_group)
    arguments = [x, residual, norm, 1e-6, True, *first, *(second if gated else [None, None, None, None, 0, 0])]
    (total, out), _ = triton_calls.call("pagegraph.kernels.quant.cuda", "norm_repacked_linear", *arguments)
    expected_total, normed = linear_reference.add_rms_norm(x, residual, norm, 1e-6)
    expected, _ = triton_calls.call("pagegraph.kernels.quant.cuda", "repacked_linear", normed, *first, True, gated)
    if gated:
        expected, _ = triton_calls.call("pagegraph.kernels.quant.cuda", "repacked_linear", expected, *second, True)
    assert torch.equal(total, expected_total) and out.shape == expected.shape == (1, rows, out_size if gated else width)
    assert ((out.float() - expected.float()).norm() / expected.float().norm()).item() < 2**-6
    whole_total, whole = torch.ops.pagegraph.norm_repacked_linear(*arguments)
    assert (
        torch.equal(whole_total, total) and ((out.float() - whole.float()).norm() / whole.float().norm()).item() < 0.06
    )


@pytest.mark.parametrize("gated", [False, True])
def test_the_op_is_well_formed(gated: bool) -> None:
    x, norm = random_rows(3, 128)[None].contiguous(), torch.rand(128).bfloat16()
    first = [*repacked(*random_weight("int8", 256, 128, 128, False), 128, 128), None, 128, 256]
    second = (
        [*repacked(*random_weight("int8", 64, 128, 128, False), 128, 128), None, 128, 64]
        if gated
        else [None, None, None, None, 0, 0]
    )
    torch.library.opcheck(
        torch.ops.pagegraph.norm_repacked_linear.default,
        (x, x, norm, 1e-6, True, *first, *second),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("size", [128, 200])
def test_codes_are_within_half_a_step_of_what_they_stand_for(size: int) -> None:
    x = random_rows(6, size)
    qweight, scale = quant_reference.int8_rows(x)
    back = quant_reference.decoded_rows(qweight, scale, size)
    step = scale.t().repeat_interleave(ACTIVATION_GROUP, dim=1)[:, :size]
    assert ((back - x.float()).abs() <= 0.5001 * step).all()
    floats, scale, sums = quant_reference.e4m3_rows(x)
    back = quant_reference.decoded_rows(floats.float(), scale[None], size)
    assert ((back - x.float()).abs() <= 2**-4 * x.float().abs() + 2**-10 * scale[:, None]).all()
    torch.testing.assert_close((sums * scale).sum(0), back.sum(1))


def test_the_place_of_each_column() -> None:
    """Columns 8 * c + 2 * r + p of 16 at 4 * r + 2 * c + p."""
    qweight, _ = quant_reference.int8_rows(torch.arange(128.0)[None] - 0.5)
    expected, _ = quant_reference.quantize_rows(torch.arange(128.0)[None] - 0.5, torch.int8)
    for column in range(128):
        c, r, p = column % 16 // 8, column % 8 // 2, column % 2
        assert qweight[0, column // 16 * 16 + 4 * r + 2 * c + p] == expected[0, column]


@pytest.mark.parametrize(
    "rows, dtype, biased", [(1, torch.bfloat16, True), (17, torch.float16, False), (150, torch.bfloat16, True)]
)
@pytest.mark.parametrize(("out_size", "size", "tile"), SHAPES)
def test_equals_the_product_of_what_the_codes_stand_for(
    triton_calls, rows: int, out_size: int, size: int, tile: Tile, dtype: torch.dtype, biased: bool
) -> None:
    qweight, scale, _ = random_weight("int8", out_size, size, size, False)
    x, weight = random_rows(rows, size).to(dtype), qweight.float() * scale
    bias = torch.randn(out_size).to(dtype) if biased else None
    added = 0 if bias is None else bias.float()
    repacked_qweight, laid_scale, _ = repacked(qweight, scale, None, size, size)
    expected = quant_reference.decoded_rows(*quant_reference.int8_rows(x), size) @ weight.t() + added
    for _ in range(min(tile.split_k, 2)):  # the second call finds the arrival counts as the first left them
        out, _ = triton_calls.call(
            "pagegraph.kernels.quant.gemm_8bit",
            "gemm_8bit",
            x,
            QuantWeight(repacked_qweight, laid_scale, None, bias, size, out_size),
            tile,
        )
        assert out.dtype == x.dtype and out.shape == expected.shape
        # Integers are added up exactly; a code of x that is rounded the other way is a step of many.
        torch.testing.assert_close(out.float(), expected, atol=2e-3 * expected.abs().max().item(), rtol=2**-7)
    exact = x.float() @ weight.t() + added
    assert ((out.float() - exact).norm() / exact.norm()).item() < 0.02


WHOLE, SPLIT, WIDE = Tile(64, 128, 1, 4, 3), Tile(64, 128, 8, 4, 3, 32), Tile(128, 128, 2, 8, 3, 128)
GROUPED = [
    # N, K, group, whether with zeros, rows, dtype of x, dtype of scales, tile
    *((40, 320, 128, True, 17, torch.bfloat16, torch.bfloat16, tile) for tile in (WHOLE, SPLIT, WIDE)),
    *((100, 512, 256, True, 5, torch.float16, torch.float16, tile) for tile in (SPLIT, WIDE)),
    (128, 512, 128, False, 150, torch.bfloat16, torch.float32, WIDE),
    *(
        (192, 64, 64, False, 33, torch.bfloat16, torch.float32, tile) for tile in (WHOLE, SPLIT)
    ),  # a group of all columns
]


@pytest.mark.parametrize(("out_size", "size", "group", "has_zero", "rows", "dtype", "scales", "tile"), GROUPED)
def test_groups_of_4_bits(
    triton_calls,
    out_size: int,
    size: int,
    group: int,
    has_zero: bool,
    rows: int,
    dtype: torch.dtype,
    scales: torch.dtype,
    tile: Tile,
) -> None:
    qweight, *pairs = random_weight("int4", out_size, size, group, has_zero)
    scale, zero = (None if one is None else one.to(scales) for one in pairs)
    x, weight = random_rows(rows, size).to(dtype), quant_reference.dequantize(qweight, scale, zero, group)
    bias = torch.randn(out_size).to(dtype)
    floats, x_scale, _ = quant_reference.e4m3_rows(x)
    expected = quant_reference.decoded_rows(floats.float(), x_scale[None], size) @ weight.t() + bias.float()
    for _ in range(min(tile.split_k, 2)):
        out, _ = triton_calls.call(
            "pagegraph.kernels.quant.gemm_8bit",
            "gemm_8bit",
            x,
            QuantWeight(*repacked(qweight, scale, zero, group, size), bias, group, out_size),
            tile,
        )
        assert out.dtype == x.dtype and out.shape == expected.shape
        assert ((out.float() - expected).norm() / expected.norm()).item() < 6e-3
    exact = x.float() @ weight.t() + bias.float()
    assert ((out.float() - exact).norm() / exact.norm()).item() < 0.04


@pytest.mark.parametrize(("kind", "group", "has_zero"), [("int4", 64, True), ("int8", 128, False), ("int8", 256, True)])
def test_groups_that_do_not_fit_are_refused(triton_calls, kind: str, group: int, has_zero: bool) -> None:
    weight = repacked(*random_weight(kind, 64, 256, group, has_zero), group, 256)
    with pytest.raises((ValueError, AssertionError), match="have no GEMM of 8 bits"):
        triton_calls.call(
            "pagegraph.kernels.quant.gemm_8bit",
            "gemm_8bit",
            torch.zeros(1, 256).bfloat16(),
            QuantWeight(*weight, None, group, 64),
            Tile(64, 128, 1, 4, 3),
        )


@pytest.mark.parametrize("tile", [Tile(32, 128, 1, 4, 3), Tile(64, 64, 1, 4, 3), Tile(64, 128, 1, 4, 3, 256)])
def test_tiles_that_do_not_fit_are_refused(triton_calls, tile: Tile) -> None:
    qweight, scale, _ = repacked(*random_weight("int8", 64, 128, 128, False), 128, 128)
    with pytest.raises((ValueError, AssertionError), match="is not made of blocks of 64 x 128 for up to 128 rows"):
        triton_calls.call(
            "pagegraph.kernels.quant.gemm_8bit",
            "gemm_8bit",
            torch.zeros(1, 128).bfloat16(),
            QuantWeight(qweight, scale, None, None, 128, 64),
            tile,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [20, 64, 128, 200, 1000])
def test_products_of_a_model(kind: str, rows: int) -> None:
    """Large ones, with the rule's tiles and some of the table's, again and again: nothing depends on timing."""
    group = 128 if kind == "int4" else 4096
    qweight, scale, zero = random_weight(kind, 6144, 4096, group, kind == "int4")
    weight = QuantWeight(
        *(None if one is None else one.cuda() for one in repacked(qweight, scale, zero, group, 4096)), None, group, 6144
    )
    x = random_rows(rows, 4096).cuda()
    expected = x.float() @ quant_reference.dequantize(qweight, scale, zero, group).t().cuda()
    ruled = [choice_of(kind, count, 512, 4096, True) for count in (100, 1000)]
    for choice in (
        *ruled,
        by_gemm_8bit(128, 1, 8, 3, 128),
        by_gemm_8bit(64, 2, 4, 4, 64),
        by_gemm_8bit(64, 4, 4, 3, 128),
    ):
        first = repacked_linear_by(choice, x, weight)
        assert ((first.float() - expected).norm() / expected.norm()).item() < 0.04
        assert all(torch.equal(first, repacked_linear_by(choice, x, weight)) for _ in range(20))
