"""Experts of a mixture: the reference against one token at a time, and the op on a CPU against the reference."""

from __future__ import annotations

import pytest
import torch

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.moe import cpu_few, reference
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.quant.cpu import dequantized_rows
from pagegraph.kernels.quant.weight import QuantWeight
from tests.kernels.moe.cases import FORMS, GPT_OSS, KINDS, ROUTINGS, experts_of, quantised_of


def close(got: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(got.float(), expected.float(), atol=bound, rtol=bound)


def test_the_reference_is_a_weighted_sum_over_the_chosen() -> None:
    """Written out for each token by itself, with the gate of GPT-OSS spelled out."""
    given = experts_of(5, 3, 8, form=GPT_OSS, bias=True)
    got = reference.experts(*given, *GPT_OSS)
    for token, (row, chosen, weights) in enumerate(zip(given.x, given.chosen, given.weights)):
        total = torch.zeros(48)
        for expert, weight in zip(chosen, weights):
            product = row @ given.up[expert] + given.up_bias[expert]
            gate, up = product[::2].clamp(max=2.0), product[1::2].clamp(-2.0, 2.0)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            total += weight * (inner @ given.down[expert] + given.down_bias[expert])
        close(got[token], total)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_forms(name: str, tokens: int, bias: bool) -> None:
    form = FORMS[name]
    given = experts_of(tokens, 2, 8, form=form, bias=bias)
    close(torch.ops.pagegraph.experts(*given, *form), reference.experts(*given, *form))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("experts", "choices"), [(8, 1), (8, 4), (256, 8)])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_routings(routing: str, experts: int, choices: int, tokens: int) -> None:
    given = experts_of(tokens, choices, experts, routing=routing)
    close(torch.ops.pagegraph.experts(*given, *Form()), reference.experts(*given, *Form()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "inner"), [(42, 24), (48, 21), (64, 32)])
def test_rows_that_are_not_whole_16_bytes(hidden: int, inner: int, dtype: torch.dtype) -> None:
    """PyTorch's grouped product does not take them."""
    given = experts_of(20, 2, 8, hidden, inner, dtype=dtype)
    got = torch.ops.pagegraph.experts(*given, *Form())
    close(got, reference.experts(*given, *Form()), 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("live", [0, 1, 5])
def test_padding_comes_out_as_zeros(live: int) -> None:
    """Whatever it holds."""
    given = experts_of(9, 2, 8, live=live)
    for function in (torch.ops.pagegraph.experts, reference.experts):
        got = function(*given, *Form())
        alone = function(*(t[:live] for t in given[:3]), *given[3:7], None, *Form()) if live else got[:0]
        assert not got[live:].any()
        close(got[:live], alone)


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_choice_that_is_no_expert_adds_nothing(tokens: int) -> None:
    given = experts_of(tokens, 3, 8)
    given.chosen[:, 1] = torch.tensor([8, -1])[torch.arange(tokens) % 2]
    without = given._replace(chosen=given.chosen[:, ::2], weights=given.weights[:, ::2])
    for function in (torch.ops.pagegraph.experts, reference.experts):
        close(function(*given, *Form()), reference.experts(*without, *Form()))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_16_bits(weights: torch.dtype) -> None:
    """Routing weights come in the type of the rows or in float32."""
    given = experts_of(20, 4, 8, dtype=torch.bfloat16)
    given = given._replace(weights=given.weights.to(weights))
    got, expected = torch.ops.pagegraph.experts(*given, *Form()), reference.experts(*given, *Form())
    assert got.dtype == expected.dtype == torch.bfloat16
    close(got, expected, 3e-2)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="activation 'swish' .* 'silu' is"):
        torch.ops.pagegraph.experts(*experts_of(2, 1, 4), *Form("swish"))


@pytest.fixture(params=["pytorch", "cpp"])
def products_of_few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which products of few rows are computed."""
    monkeypatch.setattr(cpu_few, "_kernel", None)
    if request.param == "cpp":
        cpu_few.build()
        assert cpu_few._kernel is not None
        monkeypatch.setattr(cpu_few, "MOST_ROWS", dict.fromkeys(cpu_few.KINDS, 100))
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_quantised_weights(products_of_few: str, kind: str, tokens: int, bias: bool) -> None:
    """As by the dequantised weights; of so many rows that they are dequantised in several blocks."""
    form = GPT_OSS._replace(transposed=False) if bias else Form()
    given = experts_of(tokens, 2, 4, 256, 512, form=form, bias=bias)
    quantised = quantised_of(given, kind)
    got = torch.ops.pagegraph.quant_experts(*quantised, *form)
    close(got, reference.quant_experts(*quantised, *form))
    wide = [reference.dequantize(*weight) for weight in (quantised[3:7], quantised[8:12])]
    close(got, reference.experts(*given._replace(up=wide[0], down=wide[1]), *form))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_dequantised_bit_for_bit(kind: str) -> None:
    qweight, scale, zero, group = quantised_of(experts_of(1, 1, 4, 256, 512), kind)[3:7]
    for dtype in (torch.float32, torch.bfloat16):
        weight = QuantWeight(qweight, scale, zero, None, group, 1024)
        got = dequantized_rows(weight, 2, slice(100, 300), dtype)
        assert torch.equal(got, reference.dequantize(qweight, scale, zero, group)[2, 100:300].to(dtype))


@pytest.mark.parametrize("kind", ["int8 row", "fp8 row"])
def test_columns_that_fill_no_vector(products_of_few: str, kind: str) -> None:
    given = quantised_of(experts_of(3, 2, 4, 43, 21), kind)
    close(torch.ops.pagegraph.quant_experts(*given, *Form()), reference.quant_experts(*given, *Form()))


@pytest.mark.parametrize("kind", ["int4", "fp8 row"])
def test_quantised_weights_in_16_bits(products_of_few: str, kind: str) -> None:
    given = experts_of(3, 2, 4, 64, 32, dtype=torch.bfloat16)
    quantised = quantised_of(given, kind)
    got = torch.ops.pagegraph.quant_experts(*quantised, *Form())
    assert got.dtype == torch.bfloat16
    close(got, reference.quant_experts(*quantised, *Form()), 3e-2)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float8_e4m3fn, "fp8"), (torch.uint8, "mxfp4")])
def test_every_small_float_is_read(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One column after another, by rows of x that hold a single 1."""
    monkeypatch.setattr(cpu_few, "_kernel", None)
    cpu_few.build()
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # no numbers, as e4m3
    qweight = codes.view(dtype).view(1, 2, 128).contiguous()
    size = 128 if kind == "fp8" else 256
    scale = (
        torch.tensor([[[1.0], [0.25]]]) if kind == "fp8" else torch.arange(120, 136, dtype=torch.uint8).view(1, 2, 8)
    )
    weight = QuantWeight(qweight, scale, None, None, size if kind == "fp8" else 32, 2)
    out = torch.empty(size, 2)
    cpu_few.products(torch.eye(size), [(0, 0, size)], weight, out)
    assert torch.equal(out.t(), reference.dequantize(*weight[:3], weight.group)[0])


@pytest.mark.parametrize("live", [0, 1, 5])
def test_padding_of_quantised_experts_comes_out_as_zeros(products_of_few: str, live: int) -> None:
    given = quantised_of(experts_of(9, 2, 4, 64, 64, live=live), "int8 row")
    given[1][0, 1] = -1
    got = torch.ops.pagegraph.quant_experts(*given, *Form())
    assert not got[live:].any()
    close(got, reference.quant_experts(*given, *Form()))
