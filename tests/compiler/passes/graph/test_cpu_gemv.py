"""Products of one narrow row as loops of the compiler: which are rewritten, what they give, and that states are computed once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from pagegraph.compiler.inductor.compile import compile_forward
from pagegraph.compiler.passes.graph.cpu_gemv import one_row_linears
from pagegraph.compiler.quantization.layouts import Int4Packed, Int8Dynamic
from pagegraph.compiler.quantization.linear import QuantLinear
from pagegraph.compiler.quantization.online import quantize
from pagegraph.kernels.quant import cpu_int4

pytestmark = pytest.mark.usefixtures("graphs_anew")


class Gated(nn.Module):
    """Two products, the second of them reading a half of the first as it lies in memory or gated: [1, rows, 64] -> the same."""

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wide, self.back, self.plain = nn.Linear(64, 192, bias), nn.Linear(96, 64, bias), nn.Linear(96, 64, bias)
        for parameter in self.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.wide(states).split(96, dim=-1)
        return self.back(nn.functional.silu(gate) * up) + self.plain(up)


def compiled(module: nn.Module, states: Tensor) -> tuple[Tensor, str, int]:
    """(result, generated code, products rewritten)"""
    torch._dynamo.reset()
    found: list[int] = []
    forward = compile_forward(module, [lambda graph: found.append(one_row_linears(graph)) or found[-1]])
    with torch.inference_mode():
        out, (code,) = run_and_get_code(forward, states)
    return out, code, found[0]


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_is_summed_in_float32(bias: bool) -> None:
    module = Gated(torch.bfloat16, bias)
    states = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    out, code, found = compiled(module, states)
    assert found == 3 and "extern_kernels" not in code.split("def call")[1]
    assert "pagegraph" not in code.split("def call")[1]  # no call for what has to be in memory
    assert code.count("exp()") <= 1 and out.dtype == torch.bfloat16  # the gate once, not in each output's loop
    with torch.inference_mode():
        expected = Gated(torch.bfloat16, bias).float()(states.float())
        eager = module(states)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.02)
    assert (out.float() - expected).abs().max() <= 1.5 * (eager.float() - expected).abs().max()


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_wide_dtypes_and_more_rows_stay(dtype: torch.dtype, rows: int) -> None:
    module = Gated(dtype, True)
    states = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, _, found = compiled(module, states)
    assert found == 0
    with torch.inference_mode():
        torch.testing.assert_close(out, module(states), atol=0.03, rtol=0.02)


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"),
    [
        (96, 64, torch.bfloat16),
        (98, 100, torch.bfloat16),
        (7, 33, torch.bfloat16),
        (98, 100, torch.float16),
        (7, 33, torch.float32),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_of_int8_is_summed_over_the_widened_weight(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(outputs, inputs, generator=generator) * 0.2).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    linear = QuantLinear(quantize(weight, "int8", "w")._replace(bias=bias), dtype)
    states = torch.randn(1, rows, inputs, generator=generator).to(dtype)
    out, code, _ = compiled(Int8Dynamic(linear), states)
    assert ("_int_mm" in code) == (rows > 1)
    assert out.dtype == dtype
    expected = states.float() @ linear.dequantized().float().t() + bias.float()
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("outputs", "dtype", "built"),
    [
        (192, torch.bfloat16, True),
        (192, torch.bfloat16, False),
        (80, torch.bfloat16, True),
        (192, torch.float16, True),
        (80, torch.float32, True),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_int4_by_rows(
    rows: int, outputs: int, dtype: torch.dtype, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of bfloat16 goes to the C++ where it is built and takes the size, past the dispatcher; all come out right."""
    monkeypatch.setattr(cpu_int4, "_kernel", None)
    if built:
        cpu_int4.build()
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(outputs, 96, generator=generator) * 0.2).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    linear = Int4Packed(QuantLinear(quantize(weight, "int4", "w")._replace(bias=bias), dtype))
    states = torch.randn(1, rows, 96, generator=generator).to(dtype)
    out, code, _ = compiled(linear, states)
    direct = linear.unpacks and cpu_int4.takes(dtype, rows)
    assert ("pagegraph_int4_row" in code) == direct
    torch.testing.assert_close(out, linear(states), atol=0.02, rtol=0.02)
    expected = (
        states.float() @ QuantLinear(quantize(weight, "int4", "w"), dtype).dequantized().float().t() + bias.float()
    )
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.02)
