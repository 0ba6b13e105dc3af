"""Products of 4-bit values in a row and the attention of one row as one call each: which are found, and the same logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from pagegraph.compiler.inductor.compile import compile_forward
from pagegraph.compiler.passes.graph.cpu_int4_layer import fuse_int4_layer
from pagegraph.compiler.passes.graph.fuse_rope import rotate_one_row
from pagegraph.compiler.passes.modules.merge_linears import merge_linears
from pagegraph.compiler.passes.modules.quant_linears import quant_linears
from pagegraph.compiler.quantization.linear import QuantLinear
from pagegraph.compiler.quantization.online import quantize
from pagegraph.compiler.step.forward import mark_dynamic
from pagegraph.kernels.attention import cpu_decode
from pagegraph.kernels.quant import cpu_int4
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import paged_copy, random_model
from tests.compiler.paged_run import run_paged

pytestmark = pytest.mark.usefixtures("graphs_anew")

PROMPT, STEPS = list(range(3, 21)), [[15], [1], [1], [1]]

# Products in each chain of a model of two layers. The last layer's last product meets a norm, but the head is none of them.
FOUND = {
    "llama": [2, 4],
    "qwen3": [2, 4],
    "qwen2": [2, 4],  # products with a bias
    "mixtral": [],  # behind the norm a router and experts read
    "olmo2": [],  # norms stand behind the products
}

OFTEN = {"qwen2"}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpu_int4, cpu_decode):
        monkeypatch.setattr(module, "_kernel", None)
        module.build()
    if not cpu_int4.takes(torch.bfloat16, 1):
        pytest.skip("no AVX-512")


def int4_model(name: str) -> nn.Module:
    config = tiny_config(name, num_hidden_layers=2)
    paged = paged_copy(config, random_model(config)).to(torch.bfloat16)
    for parent in list(paged.modules()):
        for child, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and child.endswith("proj"):
                setattr(
                    parent,
                    child,
                    QuantLinear(quantize(linear.weight, "int4", child)._replace(bias=linear.bias), torch.bfloat16),
                )
    merge_linears(paged)
    quant_linears(paged)
    return paged


@torch.inference_mode()
def logits(paged: nn.Module, forward: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
    """(those of the steps of one row, code that was generated meanwhile)"""
    torch._dynamo.reset()
    (out,), codes = run_and_get_code(run_paged, forward, paged, [PROMPT], STEPS, torch.bfloat16, 0)
    return torch.stack([out[at] for at in sorted(out)[1:]]), codes


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in FOUND])
def test_logits_stay_and_the_known_forms_are_found(name: str, kernels: None) -> None:
    paged = int4_model(name)
    counts: list[list[int]] = []

    def chained(module: torch.fx.GraphModule) -> int:
        pairs = fuse_int4_layer(module)
        chains = [node for node in module.graph.nodes if node.target is torch.ops.pagegraph.int4_packed_layer]
        counts.append(sorted(node.args[3][0] for node in chains))
        return pairs

    compiled = compile_forward(paged, [rotate_one_row, chained])

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        mark_dynamic(*inputs[:8])
        return compiled(*inputs)

    plain, _ = logits(paged, paged)
    out, (*_, code) = logits(paged, forward)
    assert counts == [[], FOUND[name]]  # many rows stay
    assert ("pagegraph_int4_layer" in code) == bool(FOUND[name])
    assert code.count("extern_kernels.pagegraph_attention_of_one_row(") == len(paged.layouts)
    # Sums are rounded where the compiler keeps them wide.
    torch.testing.assert_close(out, plain, atol=0.03 * plain.abs().max().item(), rtol=0)
