"""Products with quantised weights against their reference: kinds of codes, groups, splits, sizes that do not divide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from kernels import quant_tiles, reference
from kernels.quant_tiles import FEW_ROWS, Choice, Tile, choice_of, tile_by_rule

MIXED = [
    # kind, N, K, group, tile
    ("int8", 96, 64, 64, Tile(32, 64, 1, 4, 3)),
    ("int8", 40, 160, 160, Tile(16, 64, 2, 4, 3)),  # rows beyond the last tile, columns beyond the last step
    ("int8", 32, 96, 16, Tile(16, 16, 2, 4, 3)),
    ("fp8", 64, 192, 192, Tile(32, 64, 8, 4, 3)),  # more splits than columns to share
    ("fp8", 32, 200, 128, Tile(16, 64, 2, 4, 3)),  # the last group is short
    ("int8", 96, 192, 192, Tile(64, 64, 2, 4, 3, 256)),  # with many rows, columns split for each block of them
]
FOUR_BITS = [
    # N, K, group, tile
    (64, 128, 32, Tile(64, 64, 1, 4, 3)),  # two groups a step
    (128, 256, 64, Tile(128, 128, 2, 4, 3)),
    (64, 256, 128, Tile(64, 128, 2, 4, 3)),
    (100, 160, 160, Tile(128, 128, 1, 4, 3)),  # rows beyond the last block and tile, columns beyond the last step
    (200, 192, 96, Tile(128, 128, 1, 4, 3)),  # a step that begins within a group
    (64, 320, 160, Tile(64, 64, 4, 4, 3)),  # more splits than columns to share
    (128, 256, 128, Tile(128, 64, 2, 8, 3, 128)),  # with many rows, columns split for each block of them
]


def random_weight(kind: str, rows: int, size: int, group: int, shifted: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rows + size)
    groups = -(-size // group)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    shift = torch.randn(rows, groups, generator=generator) if shifted else None
    if kind == "fp8":
        return (torch.randn(rows, size, generator=generator) * 30).to(torch.float8_e4m3fn), scale, shift
    limit = 8 if kind == "int4" else 128
    codes = torch.randint(-limit, limit, (rows, size), dtype=torch.int8, generator=generator)
    return reference.pack_nibbles(codes) if kind == "int4" else codes, scale, shift


def multiplied(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] float32 that rows are multiplied by: with a shift, and of integers in groups, rounded to dtype."""
    weight = reference.dequantize(codes, scale, shift, group)
    exact = shift is None and (scale.shape[1] == 1 or codes.dtype == torch.float8_e4m3fn)
    return weight if exact else weight.to(dtype).float()


@pytest.mark.parametrize("rows", [1, 17, 150])
@pytest.mark.parametrize(("kind", "out_size", "size", "group", "tile"), MIXED)
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_the_reference(
    triton_calls, rows: int, kind: str, out_size: int, size: int, group: int, tile: Tile, shifted: bool
) -> None:
    codes, scale, shift = random_weight(kind, out_size, size, group, shifted)
    x = torch.randn(rows, size + 16, generator=torch.Generator().manual_seed(rows)).bfloat16()[:, :size]
    bias = torch.randn(out_size).bfloat16() if shifted else None
    expected = x.float() @ multiplied(codes, scale, shift, group, x.dtype).t() + (0 if bias is None else bias.float())
    for _ in range(2):  # the second call finds the arrival counts as the first left them
        out, _ = triton_calls.call("kernels.quant_linear", "quant_linear", x, codes, scale, shift, bias, group, tile)
        assert out.dtype == x.dtype and out.shape == expected.shape
        # What is added up is exact but for float32: one rounding to bfloat16 at the end.
        torch.testing.assert_close(out.float(), expected, atol=1e-4 * expected.abs().max().item(), rtol=2**-8)


def laid(
    codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, group: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A weight of 4 bits as the threads of a product want it; scales of groups in bfloat16."""
    dtype = torch.bfloat16 if scale.shape[1] > 1 else torch.float32
    codes = reference.fragments(reference.unpack_nibbles(codes), reference.fragment_width(group, size))
    return codes, *(None if one is None else reference.fragment_pairs(one.to(dtype)) for one in (scale, shift))


@pytest.mark.parametrize("rows", [1, 17, 150])
@pytest.mark.parametrize(("out_size", "size", "group", "tile"), FOUR_BITS)
@pytest.mark.parametrize("shifted", [False, True])
def test_four_bits_equal_the_reference(
    triton_calls, rows: int, out_size: int, size: int, group: int, tile: Tile, shifted: bool
) -> None:
    codes, scale, shift = random_weight("int4", out_size, size, group, shifted)
    scale, shift = (None if one is None else one.bfloat16().float() for one in (scale, shift))
    x = torch.randn(rows, size + 16, generator=torch.Generator().manual_seed(rows)).bfloat16()[:, :size]
    bias = torch.randn(out_size).bfloat16() if shifted else None
    expected = x.float() @ multiplied(codes, scale, shift, group, x.dtype).t() + (0 if bias is None else bias.float())
    weight = laid(codes, scale, shift, group, size)
    torch.testing.assert_close(
        torch.ops.pagegraph.int4_linear(x, *weight, bias, group, out_size).float(), expected, atol=2**-8 * expected.abs().max().item(), rtol=2**-7
    )
    for _ in range(2):  # the second call finds the arrival counts as the first left them
        out, _ = triton_calls.call("kernels.int4_linear", "int4_linear", x, *weight, bias, group, out_size, tile)
        assert out.dtype == x.dtype and out.shape == expected.shape
        torch.testing.assert_close(out.float(), expected, atol=1e-4 * expected.abs().max().item(), rtol=2**-8)


@pytest.mark.parametrize(("out_size", "size", "group", "tile"), FOUR_BITS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_bits_come_back(
    triton_calls, out_size: int, size: int, group: int, tile: Tile, shifted: bool, dtype: torch.dtype
) -> None:
    codes, scale, shift = random_weight("int4", out_size, size, group, shifted)
    weight = laid(codes, scale, shift, group, size)
    out, _ = triton_calls.call("kernels.int4_linear", "int4_dequantize", *weight, group, out_size, size, dtype)
    rounded = (None if one is None else reference.from_fragment_pairs(one, out_size).float() for one in weight[1:])
    expected = reference.dequantize(codes, *rounded, group)
    torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11)


@pytest.mark.parametrize(("rows", "size", "width"), [(64, 64, 64), (100, 160, 32), (130, 200, 64)])
def test_fragments_are_operands_of_the_matrix_unit(rows: int, size: int, width: int) -> None:
    """By the formula, code by code; filled up with codes of 0; and back."""
    codes = torch.randint(-8, 8, (rows, size), dtype=torch.int8, generator=torch.Generator().manual_seed(rows))
    laid = reference.fragments(codes, width)
    assert laid.shape == (-(-rows // 64), -(-size // width), 128, width // 4)
    words = laid.contiguous().view(torch.int32).tolist()
    for row in range(laid.shape[0] * 64):
        w, h, q = row % 64 // 16, row % 16 // 8, row % 8
        for column in range(0, laid.shape[1] * width, 3):
            step, c, r, p = column % width // 16, column % 16 // 8, column % 8 // 2, column % 2
            word = words[row // 64][column // width][32 * w + 4 * q + r][step]
            code = (word >> 4 * (4 * p + 2 * h + c) & 15) - 8
            assert code == (codes[row, column] if row < rows and column < size else 0)
    assert torch.equal(reference.from_fragments(laid, rows, size), codes)
    scale = torch.randn(rows, 3)
    assert torch.equal(reference.from_fragment_pairs(reference.fragment_pairs(scale), rows), scale)
    assert reference.fragment_pairs(scale)[0, 2, 2 * (8 * 1 + 3) + 1] == scale[16 * 1 + 3 + 8, 2]


def test_a_tile_is_made_of_blocks(triton_calls) -> None:
    weight = laid(*random_weight("int4", 64, 128, 64, False), 64, 128)
    with pytest.raises((ValueError, AssertionError), match="is not made of blocks of 64 x 64"):
        triton_calls.call("kernels.int4_linear", "int4_linear", torch.zeros(1, 128).bfloat16(), *weight, None, 64, 64, Tile(32, 64, 1, 4, 3))


@pytest.mark.parametrize(("kind", "out_size", "size", "group", "tile"), MIXED)
@pytest.mark.parametrize("shifted", [False, True])
def test_weights_come_back(triton_calls, kind: str, out_size: int, size: int, group: int, tile: Tile, shifted: bool) -> None:
    codes, scale, shift = random_weight(kind, out_size, size, group, shifted)
    out, _ = triton_calls.call("kernels.dequantize", "dequantize", codes, scale, shift, group, torch.bfloat16)
    expected = reference.dequantize(codes, scale, shift, group)
    torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=2**-8)


def test_many_rows(triton_calls) -> None:
    codes, scale, shift = random_weight("int8", 160, 128, 64, True)
    x = torch.randn(150, 128).bfloat16()
    expected = x.float() @ multiplied(codes, scale, shift, 64, x.dtype).t()
    out, _ = triton_calls.call("kernels.quant_linear", "quant_linear", x, codes, scale, shift, None, 64, tile_by_rule("int8", 150, 160, 128, 64))
    torch.testing.assert_close(out.float(), expected, atol=1e-4 * expected.abs().max().item(), rtol=2**-8)


@pytest.mark.parametrize("digits", [1, 2])
def test_rows_become_digits(triton_calls, digits: int) -> None:
    x = (torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 0, 3e4])[:, None]).bfloat16()
    (codes, scale), _ = triton_calls.call("kernels.quantize_rows", "quantize_rows", x, torch.int8, digits)
    high, low, expected_scale = reference.two_digits(x)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # A quotient at the middle of two codes may go either way.
    assert ((codes[:5].int() - high.int()).abs() <= 1).all() and (codes[:5] == high).float().mean() > 0.999
    if digits == 2:
        back = (codes[:5].float() + codes[5:].float() / reference.SECOND_DIGIT) * scale
        assert ((back - x.float()).abs() <= scale * 0.501 / reference.SECOND_DIGIT + 1e-6 * x.float().abs()).all()


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("rows", "out_size", "size"), [(5, 48, 64), (130, 144, 208)])
def test_products_of_integers(triton_calls, digits: int, rows: int, out_size: int, size: int) -> None:
    """Exact but for float32: against the same codes multiplied by PyTorch; one part of a tile, and parts past all borders."""
    codes, scale, _ = random_weight("int8", out_size, size, size, False)
    x_codes = torch.randint(-127, 128, (digits * rows, size), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    x_scale, bias = torch.rand(rows, 1), torch.randn(out_size).bfloat16()
    wide = x_codes[:rows].double() + (x_codes[rows:].double() / reference.SECOND_DIGIT if digits == 2 else 0)
    expected = (wide @ codes.double().t() * x_scale * scale.t() + bias).float()
    out, _ = triton_calls.call("kernels.scaled_int8", "scaled_int8", x_codes, x_scale, codes, scale, bias, torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_rows_become_the_codes_of_the_reference(triton_calls) -> None:
    x = (torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 0, 3e4])[:, None]).bfloat16()
    (codes, scale), _ = triton_calls.call("kernels.quantize_rows", "quantize_rows", x)
    expected, expected_scale = reference.quantize_rows(x, torch.float8_e4m3fn)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # A quotient at the middle of two codes may go either way: at most a step of the type.
    step = expected.float().abs().clamp(min=2**-6) * 2**-3
    assert ((codes.float() - expected.float()).abs() <= step).all()
    assert (codes.float() == expected.float()).float().mean() > 0.99


@given(
    st.sampled_from(["int8", "int4", "fp8"]),
    st.integers(1, 600),
    st.integers(1, 5000).map(lambda n: 8 * n),
    st.integers(1, 300).map(lambda n: 64 * n),
    st.sampled_from([16, 32, 64, 128, 0]),
    st.booleans(),
)
def test_every_choice_can_be_run(kind: str, rows: int, out_size: int, size: int, group: int, scaled: bool) -> None:
    group = group or size
    if kind == "int4" and group % 32:
        group = 32
    choice = choice_of(kind, rows, out_size, size, group, scaled and kind != "int4" and group == size)
    if choice.way != "tile":
        assert choice.tile is None and rows > FEW_ROWS
        return
    tile = choice.tile
    if kind == "int4":
        assert tile.block_n % 64 == 0 and tile.block_k % reference.fragment_width(group, size) == 0
    else:
        assert group >= size or group % tile.block_k == 0
    assert tile.block_k >= (32 if kind == "int4" else 16)
    assert tile.split_k == 1 or tile.split_k * tile.block_k <= size
    assert tile.num_stages * tile.block_k * (tile.block_n + 2 * tile.block_t) <= 200 * 1024


def test_a_measured_choice_fits_the_weight_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {8: Choice("tile", Tile(64, 128, 2, 4, 4)), 64: Choice("scaled"), 300: Choice("plain")}
    monkeypatch.setitem(quant_tiles.TABLE, ("fp8", 512, 1024), measured)
    assert choice_of("fp8", 3, 512, 1024, 1024, True) == measured[8]
    assert choice_of("fp8", 3, 512, 1024, 32, False).tile == tile_by_rule("fp8", 3, 512, 1024, 32)
    assert choice_of("fp8", 20, 512, 1024, 1024, True).way == "scaled"
    assert choice_of("fp8", 20, 512, 1024, 128, False).way == "tile"  # a scale a block: the row-wise product does not take it
    assert choice_of("fp8", 300, 512, 1024, 1024, True).way == "plain"
    assert choice_of("fp8", 301, 512, 1024, 1024, True).way == "scaled"


@pytest.mark.parametrize("kind, rows, group", [("int4", 3, 64), ("int4", 70, 64), ("int4", 300, 64), ("int8", 2, 128), ("int8", 70, 128), ("fp8", 2, 128)])
def test_the_op_by_rows(triton_calls, kind: str, rows: int, group: int) -> None:
    """Each way but the row-wise FP8 product, which is the device's own."""
    codes, scale, shift = random_weight(kind, 48, 128, group, kind == "int4")
    x = torch.randn(1, rows, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    if kind == "int4":
        weight = laid(codes, scale, shift, group, 128)
        expected = reference.int4_linear(x.float(), *weight, None, group, 48)
        out, _ = triton_calls.call("kernels.cuda", "int4_linear", x, *weight, None, group, 48)
    else:
        expected = reference.quant_linear(x.float(), codes, scale, shift, None, group)
        out, _ = triton_calls.call("kernels.cuda", "quant_linear", x, codes, scale, shift, None, group)
    assert out.dtype == x.dtype and out.shape == expected.shape
    # Groups and shifts round the weight to bfloat16 before it is multiplied, and so does `plain`.
    torch.testing.assert_close(out.float(), expected, atol=2**-8 * expected.abs().max().item(), rtol=2**-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_row_wise_fp8_product() -> None:
    codes, scale, _ = random_weight("fp8", 64, 128, 128, False)
    x = torch.randn(100, 128).bfloat16()
    assert choice_of("fp8", 100, 64, 128, 128, True).way == "scaled"
    expected = reference.quant_linear(x.float(), codes, scale, None, None, 128)
    out = torch.ops.pagegraph.quant_linear(x.cuda(), codes.cuda(), scale.cuda(), None, None, 128).cpu()
    assert ((out.float() - expected).norm() / expected.norm()).item() < 0.05
