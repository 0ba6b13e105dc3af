"""The quantising reference ops against their definitions, and the op against its reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.quant import cpu, cpu_int4, reference


def test_nibbles_come_back_and_lie_in_spans() -> None:
    qweight = torch.randint(-8, 8, (5, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = reference.pack_nibbles(qweight)
    assert packed.shape == (5, 48) and packed.dtype == torch.uint8
    assert torch.equal(reference.unpack_nibbles(packed), qweight)
    # Byte 3 of the second span: columns 32 + 3 and 32 + 16 + 3.
    assert torch.equal(packed[:, 16 + 3].int(), (qweight[:, 35].int() + 8) + 16 * (qweight[:, 51].int() + 8))


@pytest.mark.parametrize("dtype, step", [(torch.int8, 1 / 127 / 2), (torch.float8_e4m3fn, 2**-4)])
def test_rows_are_within_half_a_step(dtype: torch.dtype, step: float) -> None:
    """int8: half of a 127th of the row's largest; e4m3: 3 bits of mantissa, a 16th of the value itself."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 7)[:, None]
    x[3] = 0
    qweight, scale = reference.quantize_rows(x, dtype)
    assert qweight.dtype == dtype and scale.shape == (7, 1)
    back = qweight.float() * scale
    size = x.abs().amax(1, keepdim=True) if dtype == torch.int8 else x.abs() + x.abs().amax(1, keepdim=True) * 2**-9
    assert ((back - x).abs() <= size * step * 1.0001).all()
    assert torch.equal(back[3], torch.zeros(64))


def test_two_digits_leave_half_a_step_of_the_second() -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 7)[:, None]
    high, low, scale = reference.int8x2(x)
    back = (high.float() + low.float() / 254) * scale
    assert ((back - x).abs() <= x.abs().amax(1, keepdim=True) / 127 / 254 / 2 * 1.01).all()


def test_groups_are_within_half_a_step() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)) + 0.3
    qweight, scale, zero = reference.quantize_groups(weight, 32)
    assert qweight.min() == -8 and qweight.max() == 7
    back = reference.dequantize(reference.pack_nibbles(qweight), scale, zero, 32)
    step = scale.repeat_interleave(32, dim=1)
    assert ((back - weight).abs() <= step * 0.501).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_the_op_multiplies_with_the_dequantised_weight(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(*shape, generator=generator) for shape in ((48, 96), (2, 5, 96), (48,)))
    zero, group = None, 96
    if kind == "int4":
        qweight, scale, zero = reference.quantize_groups(weight, 32)
        qweight, group = reference.pack_nibbles(qweight), 32
    else:
        qweight, scale = reference.quantize_rows(weight, torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    out = torch.ops.pagegraph.quant_linear(x, qweight, scale, zero, bias, group)
    whole = reference.dequantize(qweight, scale, zero, group)
    torch.testing.assert_close(out, functional.linear(x, whole, bias))
    arguments = (x, qweight, scale, zero, bias, group)
    torch.library.opcheck(torch.ops.pagegraph.quant_linear.default, arguments, test_utils="test_faketensor")


def test_the_last_group_may_be_short() -> None:
    qweight = torch.ones(2, 200, dtype=torch.int8)
    out = reference.dequantize(qweight, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None, 128)
    assert out.shape == (2, 200)
    assert torch.equal(out[:, 127:129], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


@pytest.mark.parametrize("rows", [1, 5, 130, 200])
@pytest.mark.parametrize("shape", [(64, 96), (192, 64), (320, 640)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("built", [False, True])
def test_packed_nibbles_by_rows(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows and many, against the product with the dequantised weight; one row in C++ and where that is not built."""
    monkeypatch.setattr(cpu_int4, "_kernel", None)
    if built:
        cpu_int4.build()
        assert cpu_int4.takes(torch.bfloat16, 1) == torch.cpu._is_avx512_supported()
    generator = torch.Generator().manual_seed(0)
    qweight, scale, _ = reference.quantize_groups(torch.randn(*shape, generator=generator), 32)
    zero = torch.randn(scale.shape, generator=generator) * 0.1
    packed = torch._convert_weight_to_int4pack_for_cpu(qweight.int() + 8, 1)
    if not torch.equal(cpu.unpack_int4(packed).int(), qweight.int() + 8):
        pytest.skip("this CPU packs otherwise")
    pairs = torch.stack([scale.t(), zero.t()], dim=2).to(dtype).contiguous()
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    out = torch.ops.pagegraph.int4_packed_linear(x, packed, pairs, 32)
    assert out.dtype == dtype
    scale, zero = pairs.float().permute(2, 1, 0)
    expected = reference.quant_linear(x.float(), reference.pack_nibbles(qweight), scale, zero, None, 32)
    allowed = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out.float(), expected, atol=allowed * expected.abs().max().item(), rtol=0)
    torch.library.opcheck(
        torch.ops.pagegraph.int4_packed_linear.default, (x, packed, pairs, 32), test_utils="test_faketensor"
    )


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("biased", [0, 5, 15])
@pytest.mark.parametrize("gated", [0, 2, 10])
@pytest.mark.parametrize(
    ("inputs", "hidden", "inner", "group"),
    [(128, 192, 320, 32), (64, 192, 128, 64), (128, 256, 128, 128), (32, 64, 64, 32)],
)
def test_layer_of_packed_nibbles(
    inputs: int,
    hidden: int,
    inner: int,
    group: int,
    gated: int,
    biased: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One call in C++ against PyTorch's: blocks in odd numbers, one group alone, and what is filled up to four products."""
    monkeypatch.setattr(cpu_int4, "_kernel", None)
    cpu_int4.build()
    if not cpu_int4.takes(torch.bfloat16, 1):
        pytest.skip("no AVX-512")
    generator = torch.Generator().manual_seed(0)
    biased, gated = biased % 2**count, gated % 2**count
    sizes = [(inputs, hidden), (hidden, inner << (gated >> 1 & 1)), (inner, hidden), (hidden, 128)][:count]
    random = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    tensors, numbers = [], [count, biased, gated]
    for index, (columns, rows) in enumerate(sizes):
        qweight = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.int32)
        pairs = torch.stack([random(columns // group, rows), random(columns // group, rows)], dim=2) * 0.02
        tensors += [
            torch._convert_weight_to_int4pack_for_cpu(qweight, 1),
            pairs,
            random(rows),
            *[random(hidden)] * (index % 2),
        ]
        numbers += [columns, rows, group]
    x, residual, eps = random(1, inputs), random(1, hidden), [1e-5] * (count // 2)
    expected = torch.ops.pagegraph.int4_packed_layer(x, residual, tensors, numbers, eps)
    filled = 4 // count
    out = torch.empty(1, cpu_int4.layer_size(numbers), dtype=torch.bfloat16)
    numbers = numbers + [0] * (15 - len(numbers))
    cpu_int4.layer_into(x, residual, *tensors * filled, numbers=numbers, eps=eps * filled, out=out)
    for one, other in zip(
        out.split([hidden, out.shape[1] - hidden], 1), expected.split([hidden, out.shape[1] - hidden], 1)
    ):
        torch.testing.assert_close(one, other, atol=2**-6 * other.abs().max().item(), rtol=0)
