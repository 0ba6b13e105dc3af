"""Products with quantised weights against their reference: kinds of codes, groups, splits, sizes that do not divide."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.gpu import OTHERS_TAKE
from pagegraph.kernels.quant import reference, tiles
from pagegraph.kernels.quant.tiles import (
    MEMORY_BOUND_ROWS,
    SINGLE_ROWS,
    Choice,
    QuantGemvTile,
    Tile,
    by_gemv,
    choice_of,
    gemm_16bit_tile_by_rule,
    takes_8bit_activations,
)
from pagegraph.kernels.quant.weight import QuantWeight
from tests.kernels.quant.weights import multiplied, random_weight, repacked

SHAPES = [
    # kind, N, K, group, tile
    ("int4", 64, 128, 32, Tile(64, 64, 1, 4, 3)),  # two groups a block
    ("int4", 128, 256, 64, Tile(128, 128, 2, 4, 3)),
    ("int4", 64, 256, 128, Tile(64, 128, 2, 4, 3)),
    (
        "int4",
        100,
        160,
        160,
        Tile(128, 128, 1, 4, 3),
    ),  # rows beyond the last block and tile, columns beyond the last step
    ("int4", 64, 320, 32, Tile(64, 128, 4, 4, 3)),  # more splits than columns to share
    ("int4", 128, 256, 128, Tile(128, 64, 2, 8, 3, 128)),  # with many rows, columns split for each block of them
    ("int8", 64, 128, 128, Tile(64, 64, 1, 4, 3)),
    ("int8", 40, 160, 160, Tile(64, 128, 2, 4, 3)),
    ("int8", 100, 96, 16, Tile(128, 128, 1, 4, 3)),  # four groups a block
    ("int8", 64, 192, 32, Tile(64, 64, 2, 4, 3)),
    ("int8", 192, 256, 128, Tile(64, 64, 2, 4, 3, 256)),
    ("fp8", 64, 192, 192, Tile(64, 64, 8, 4, 3)),  # more splits than columns to share
    ("fp8", 44, 160, 160, Tile(64, 64, 2, 4, 3)),
    ("fp8", 100, 200, 128, Tile(128, 128, 1, 4, 3)),  # the last group is short
    ("fp8", 128, 256, 64, Tile(64, 128, 2, 4, 3)),
    ("fp8", 96, 192, 192, Tile(64, 64, 2, 4, 3, 256)),
]


@pytest.mark.parametrize(
    ("kind", "out_size", "size", "group", "tile", "rows", "has_zero"),
    [
        (*shape, *given)
        for at, shape in enumerate(SHAPES)
        for given in (((1, False), (150, True)) if at % 2 else ((17, True), (150, False)))
    ],
)
def test_equals_the_reference(
    triton_calls, kind: str, out_size: int, size: int, group: int, tile: Tile, rows: int, has_zero: bool
) -> None:
    qweight, scale, zero = random_weight(kind, out_size, size, group, has_zero and kind != "fp8")
    x = torch.randn(rows, size + 16, generator=torch.Generator().manual_seed(rows)).bfloat16()[:, :size]
    bias = torch.randn(out_size).bfloat16() if has_zero else None
    expected = x.float() @ multiplied(qweight, scale, zero, group, x.dtype).t() + (0 if bias is None else bias.float())
    weight = repacked(qweight, scale, zero, group, size)
    rounded = torch.ops.pagegraph.repacked_linear(x, *weight, bias, group, out_size, False)
    torch.testing.assert_close(rounded.float(), expected, atol=2**-8 * expected.abs().max().item(), rtol=2**-7)
    for _ in range(min(tile.split_k, 2)):  # the second call finds the arrival counts as the first left them
        out, _ = triton_calls.call(
            "pagegraph.kernels.quant.gemm_16bit",
            "gemm_16bit",
            x,
            QuantWeight(*weight, bias, group, out_size),
            tile,
        )
        assert out.dtype == x.dtype and out.shape == expected.shape
        # What is added up is exact but for float32: one rounding to bfloat16 at the end.
        torch.testing.assert_close(out.float(), expected, atol=1e-4 * expected.abs().max().item(), rtol=2**-8)


@pytest.mark.parametrize(("kind", "out_size", "size", "group", "tile"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "has_zero"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_weights_come_back(
    triton_calls, kind: str, out_size: int, size: int, group: int, tile: Tile, has_zero: bool, dtype: torch.dtype
) -> None:
    qweight, scale, zero = random_weight(kind, out_size, size, group, has_zero and kind != "fp8")
    weight = repacked(qweight, scale, zero, group, size)
    out, _ = triton_calls.call(
        "pagegraph.kernels.quant.gemm_16bit",
        "dequantize_repacked",
        QuantWeight(*weight, None, group, out_size),
        size,
        dtype,
    )
    expected = reference.dequantize(qweight, scale, zero, group)
    torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11)


@pytest.mark.parametrize("group", [32, 128])
def test_scales_of_groups_in_bfloat16(triton_calls, group: int) -> None:
    """As a device holds them: one multiply-add for two codes, rounded once."""
    qweight, *pairs = random_weight("int4", 64, 128, group, True)
    pairs = [one.bfloat16() for one in pairs]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.float() @ multiplied(qweight, *pairs, group, x.dtype).t()
    weight = repacked(qweight, *pairs, group, 128)
    out, _ = triton_calls.call(
        "pagegraph.kernels.quant.gemm_16bit",
        "gemm_16bit",
        x,
        QuantWeight(*weight, None, group, 64),
        Tile(64, 128, 1, 4, 4),
    )
    torch.testing.assert_close(out.float(), expected, atol=1e-4 * expected.abs().max().item(), rtol=2**-8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "size"), [(64, 64), (100, 160)])
def test_fragments_are_operands_of_the_matrix_unit(rows: int, size: int, bits: int) -> None:
    """By the formula, value by value; filled up with zeros; and back."""
    limit = 1 << bits - 1
    qweight = torch.randint(
        -limit, limit, (rows, size), dtype=torch.int8, generator=torch.Generator().manual_seed(rows)
    )
    repacked = reference.repack(qweight, bits)
    assert repacked.shape == (-(-rows // 64), -(-size // 64), 32 * bits, 16)
    bytes_ = repacked.tolist()
    for row in range(repacked.shape[0] * 64):
        w, h, q = row % 64 // 16, row % 16 // 8, row % 8
        for column in range(0, repacked.shape[1] * 64, 3):
            step, c, r, p = column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2
            thread = 32 * w + 4 * q + r
            block = bytes_[row // 64][column // 64]
            if bits == 4:
                code = (block[thread][4 * step + 2 * p + h] >> 4 * c & 15) - 8
            else:
                code = block[128 * (step // 2) + thread][8 * (step % 2) + 4 * c + 2 * p + h]
            assert code == (qweight[row, column] if row < rows and column < size else 0)
    assert torch.equal(reference.from_repacked(repacked, rows, size), qweight)


@pytest.mark.parametrize("group, size", [(16, 96), (32, 160), (64, 160), (128, 384), (160, 160)])
def test_pairs_lie_beside_fragments(group: int, size: int) -> None:
    scale = torch.randn(100, -(-size // group))
    pairs = reference.repack_scales(scale, group, size)
    assert torch.equal(reference.from_repacked_scales(pairs, 100, scale.shape[1]), scale)
    groups = pairs.shape[3] // 2
    for row in (0, 7, 8, 27, 77, 99):
        for at in range(scale.shape[1]):
            block, n = divmod(at, groups)
            assert pairs[row // 64, block, 8 * (row % 64 // 16) + row % 8, 2 * n + row % 16 // 8] == scale[row, at]


@pytest.mark.parametrize("size", [64, 200])
def test_columns_are_exchanged_within_64(size: int) -> None:
    values = torch.arange(size).repeat(2, 1) + 1
    exchanged = reference.exchanged_columns(values)
    assert exchanged.shape == (2, -(-size // 64) * 64)
    for column in range(exchanged.shape[1]):
        step, c, r, p = column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2
        at = column // 64 * 64 + 16 * r + 4 * step + 2 * c + p
        assert exchanged[1, at] == (column + 1 if column < size else 0)
    assert torch.equal(reference.restored_columns(exchanged, size), values)


def test_a_tile_is_made_of_blocks(triton_calls) -> None:
    weight = repacked(*random_weight("int4", 64, 128, 64, False), 64, 128)
    with pytest.raises((ValueError, AssertionError), match="is not made of blocks of 64 x 64"):
        triton_calls.call(
            "pagegraph.kernels.quant.gemm_16bit",
            "gemm_16bit",
            torch.zeros(1, 128).bfloat16(),
            QuantWeight(*weight, None, 64, 64),
            Tile(32, 64, 1, 4, 3),
        )


@pytest.mark.parametrize("size", [3000, 64])
def test_rows_become_the_codes_of_the_reference(triton_calls, size: int) -> None:
    x = (
        torch.randn(5, size, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 0, 3e4])[:, None]
    ).bfloat16()
    (qweight, scale), _ = triton_calls.call("pagegraph.kernels.quant.activations", "exchanged_e4m3_rows", x)
    expected, expected_scale = reference.quantize_rows(x, torch.float8_e4m3fn)
    expected = reference.exchanged_columns(expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # A quotient at the middle of two codes may go either way: at most a step of the type.
    step = expected.float().abs().clamp(min=2**-6) * 2**-3
    assert ((qweight.float() - expected.float()).abs() <= step).all()
    assert (qweight.float() == expected.float()).float().mean() > 0.99


@given(
    st.sampled_from(["int8", "int4", "fp8"]),
    st.integers(1, 600),
    st.integers(1, 5000).map(lambda n: 8 * n),
    st.integers(1, 300).map(lambda n: 64 * n),
    st.booleans(),
    st.booleans(),
)
def test_every_choice_can_be_run(
    kind: str, rows: int, out_size: int, size: int, quantize_x: bool, narrow: bool
) -> None:
    choice = choice_of(kind, rows, out_size, size, quantize_x, narrow)
    if choice.way == "gemv":
        assert rows <= SINGLE_ROWS and narrow and isinstance(choice.tile, QuantGemvTile)
        return
    if choice.way == "gemm_8bit":
        assert quantize_x and kind != "fp8" and choice.tile.block_k == 128 and choice.tile.block_t <= 128
    elif choice.way == "scaled_mm":
        assert choice.tile is None and kind == "fp8" and quantize_x and rows > SINGLE_ROWS
        return
    elif choice.way == "dequantize":
        assert choice.tile is None and rows > MEMORY_BOUND_ROWS
        return
    tile = choice.tile
    assert tile.block_n % 64 == 0 and tile.block_k % 64 == 0
    assert tile.split_k == 1 or tile.split_k * tile.block_k <= size
    assert tile.num_stages * tile.block_k * (tile.block_n + 2 * tile.block_t) <= 200 * 1024


def test_a_measured_choice_fits_the_weight_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {8: Choice("gemm_16bit", Tile(64, 128, 2, 4, 4)), 64: Choice("scaled_mm"), 300: Choice("dequantize")}
    monkeypatch.setitem(tiles.TABLE[OTHERS_TAKE], ("fp8", 512, 1024), measured)
    assert choice_of("fp8", 3, 512, 1024, True) == choice_of("fp8", 3, 512, 1024) == measured[8]
    monkeypatch.setitem(tiles.TABLE[OTHERS_TAKE], ("int8", 512, 1024), {8: by_gemv(1, 2, 1, 3)})
    assert choice_of("int8", 3, 512, 1024) == by_gemv(1, 2, 1, 3)
    assert choice_of("int8", 3, 512, 1024, narrow=False).tile == gemm_16bit_tile_by_rule(3, 512, 1024)  # float32 states
    assert choice_of("fp8", 20, 512, 1024, True).way == "scaled_mm"
    assert choice_of("fp8", 20, 512, 1024).tile == gemm_16bit_tile_by_rule(
        20, 512, 1024
    )  # a scale a block: the row-wise product does not take it
    assert choice_of("fp8", 300, 512, 1024, True).way == "dequantize"
    assert choice_of("fp8", 301, 512, 1024, True).way == "scaled_mm"
    assert choice_of("int4", 12, 512, 1024).tile == gemm_16bit_tile_by_rule(12, 512, 1024)


@pytest.mark.parametrize(
    "kind, rows, group",
    [
        ("int4", 3, 64),
        ("int4", 20, 64),
        ("int4", 70, 64),
        ("int4", 300, 64),
        ("int4", 70, 128),
        ("int8", 2, 128),
        ("int8", 70, 128),
        ("int8", 300, 32),
        ("fp8", 2, 128),
        ("fp8", 300, 64),
    ],
)
def test_the_op_by_rows(triton_calls, kind: str, rows: int, group: int) -> None:
    """Each way but the row-wise FP8 product, which is the device's own."""
    qweight, scale, zero = random_weight(kind, 44, 128, group, kind == "int4")
    x = torch.randn(1, rows, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = reference.quant_linear(x.float(), qweight, scale, zero, None, group)
    out, _ = triton_calls.call(
        "pagegraph.kernels.quant.cuda",
        "repacked_linear",
        x,
        *repacked(qweight, scale, zero, group, 128),
        None,
        group,
        44,
        True,
    )
    assert out.dtype == x.dtype and out.shape == expected.shape
    # Groups and zeros round the weight to bfloat16 before it is multiplied, and so does dequantize; gemm_8bit quantises x.
    part = (
        {"int8": 2**-6, "int4": 2**-5}[kind] if kind != "fp8" and rows > MEMORY_BOUND_ROWS and group == 128 else 2**-8
    )
    torch.testing.assert_close(out.float(), expected, atol=part * expected.abs().max().item(), rtol=2**-7)


@pytest.mark.parametrize(
    "kind, dtype, out_size, group, has_zero, capability, takes",
    [
        ("int4", torch.bfloat16, 100, 128, True, (8, 9), True),
        ("int4", torch.float16, 100, 512, False, (9, 0), True),
        ("int4", torch.bfloat16, 100, 128, True, (8, 6), False),  # knows no e4m3
        ("int4", torch.bfloat16, 100, 64, True, (9, 0), False),
        ("int4", torch.float32, 100, 128, True, (9, 0), False),
        ("int8", torch.bfloat16, 100, 512, False, (8, 0), True),
        ("int8", torch.bfloat16, 100, 128, False, (9, 0), False),
        ("int8", torch.bfloat16, 100, 512, True, (9, 0), False),
        ("fp8", torch.bfloat16, 96, 512, False, (9, 0), True),
        ("fp8", torch.bfloat16, 96, 512, False, (8, 0), False),  # where PyTorch refuses
        ("fp8", torch.bfloat16, 100, 512, False, (9, 0), False),
        ("fp8", torch.float16, 96, 512, False, (9, 0), False),
        ("fp8", torch.bfloat16, 96, 128, False, (9, 0), False),
    ],
)
def test_which_products_take_rows_of_8_bits(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    out_size: int,
    group: int,
    has_zero: bool,
    capability: tuple[int, int],
    takes: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = SimpleNamespace(
        kind=kind,
        out_size=out_size,
        group=group,
        zero=has_zero or None,
        qweight=SimpleNamespace(device=torch.device("cuda")),
    )
    assert takes_8bit_activations(weight, 512, dtype) == takes


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_rows_stay_as_they_are_where_they_shall(triton_calls, kind: str) -> None:
    qweight, scale, zero = random_weight(kind, 44, 128, 128, kind == "int4")
    x = torch.randn(70, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = reference.quant_linear(x.float(), qweight, scale, zero, None, 128)
    errors = []
    for quantize_x in (True, False):
        out, _ = triton_calls.call(
            "pagegraph.kernels.quant.cuda",
            "repacked_linear",
            x,
            *repacked(qweight, scale, zero, 128, 128),
            None,
            128,
            44,
            quantize_x,
        )
        errors.append(((out.float() - expected).norm() / expected.norm()).item())
    assert errors[1] < 2**-8 < errors[0] < 2**-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [128, 200])
def test_the_row_wise_fp8_product(size: int) -> None:
    qweight, scale, _ = random_weight("fp8", 64, size, size, False)
    x = torch.randn(100, size).bfloat16()
    assert choice_of("fp8", 100, 64, size, True).way == "scaled_mm"
    expected = reference.quant_linear(x.float(), qweight, scale, None, None, size)
    out = torch.ops.pagegraph.repacked_linear(
        x.cuda(), reference.exchanged_columns(qweight).cuda(), scale.cuda(), None, None, size, 64, True
    ).cpu()
    assert ((out.float() - expected).norm() / expected.norm()).item() < 0.05
