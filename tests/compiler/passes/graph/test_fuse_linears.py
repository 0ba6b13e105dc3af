"""Rows of linear, norm, linear, gate as one op: found where they have the known form, and the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pagegraph.compiler.passes.graph.fuse_linears import fuse_linears
from pagegraph.compiler.passes.graph.fuse_norms import fuse_rows
from pagegraph.compiler.passes.graph.fuse_rope import fuse_rope
from pagegraph.compiler.passes.graph.fuse_routers import fuse_routers
from pagegraph.compiler.passes.modules import quant_linears
from pagegraph.compiler.passes.modules.fixed_linears import fixed_linears
from pagegraph.compiler.passes.modules.merge_linears import merge_linears
from pagegraph.compiler.passes.modules.skinny_linears import skinny_linears
from pagegraph.compiler.quantization.layouts import RepackedLinear
from pagegraph.compiler.quantization.linear import QuantLinear
from pagegraph.compiler.quantization.online import quantize
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import MIXED, check_compiled, paged_copy, random_model

# (with a gate, without) of a model of four layers: the last product of the last layer meets a norm, but rows are picked behind it
FOUND = {
    "llama": (4, 3),
    "qwen3": (4, 3),
    "qwen2": (4, 3),  # products with a bias
    "olmo2": (0, 0),  # norms stand behind the products
}
OFTEN = {"qwen2", "olmo2"}
MIXTURES = (pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in FOUND])
def test_logits_stay_and_the_known_forms_are_found(name: str) -> None:
    stock = random_model(tiny_config(name))
    paged = paged_copy(tiny_config(name), stock)
    merge_linears(paged)
    assert skinny_linears(paged, "cuda") > 0
    graphs = check_compiled(stock, paged, [fuse_rope, fuse_rows, fuse_linears], MIXED)
    fused = [node for node in graphs[0].graph.nodes if node.target is torch.ops.pagegraph.linear_norm_linear]
    gated = sum(node.args[-3] for node in fused)
    assert (gated, len(fused) - gated) == FOUND[name]


def test_a_gate_joins_the_product_of_deterministic() -> None:
    stock = random_model(tiny_config("qwen3"))
    paged = paged_copy(tiny_config("qwen3"), stock)
    merge_linears(paged)
    assert fixed_linears(paged) > 0
    graphs = check_compiled(stock, paged, [fuse_rope, fuse_rows, fuse_linears], MIXED)
    called = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    products = [node for node in called if node.target is torch.ops.pagegraph.fixed_linear]
    assert sum(node.args[3:] == (True,) for node in products) == 4
    assert not any(node.target is torch.ops.pagegraph.silu_mul for node in called)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_router_joins_what_is_ahead_and_experts_take_the_addition(name: str) -> None:
    """In each layer; what is behind the last one's experts meets a norm, but rows are picked behind it."""
    config = tiny_config(name)
    stock = random_model(config)
    paged = paged_copy(config, stock)
    merge_linears(paged)
    assert skinny_linears(paged, "cuda") > 0
    graphs = check_compiled(stock, paged, [fuse_rope, fuse_rows, fuse_routers, fuse_linears], MIXED)
    ops, layers = torch.ops.pagegraph, config.num_hidden_layers
    called = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    routers = [node for node in called if node.target is ops.linear_norm_linear]
    assert [node.args[-2] for node in routers] == [True] * layers
    assert sum("residual" in node.kwargs for node in called if node.target is ops.experts) == layers - 1
    assert sum(node.target is ops.norm_linear for node in called) == layers - 1
    assert sum(node.target is ops.add_rms_norm for node in called) == 1


def test_a_shared_expert_has_its_gates_in_other_kernels() -> None:
    """That of its halves in the product before it, that of all of it, a product of one column, in a sum."""
    config = tiny_config("qwen3_next")
    stock = random_model(config)
    paged = paged_copy(config, stock)
    merge_linears(paged)
    assert skinny_linears(paged, "cuda") > 0
    (graph,) = check_compiled(stock, paged, [fuse_rope, fuse_rows, fuse_routers, fuse_linears], MIXED)
    ops = torch.ops.pagegraph
    products = [node for node in graph.graph.nodes if node.target is ops.linear]
    assert [node.args[3:] for node in products].count((True,)) == config.num_hidden_layers
    assert not any(node.target is ops.silu_mul for node in graph.graph.nodes)
    assert all(node.args[1].meta["example_value"].shape[0] > 1 for node in products)
    assert [node.target for node in graph.graph.nodes].count("sum") == config.num_hidden_layers


def test_what_is_ahead_joins_quantised_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form that they have on CUDA, on the CPU by the reference of its op."""
    monkeypatch.setattr(quant_linears, "_form", lambda linear, quantize_x, _: RepackedLinear(linear, quantize_x))
    stock = random_model(tiny_config("llama"))
    for parent in list(stock.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and name.endswith("proj"):
                linear.weight.data = QuantLinear(quantize(linear.weight, "int8", name), torch.float32).dequantized()
    paged = paged_copy(tiny_config("llama"), stock)
    for parent in list(paged.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and name.endswith("proj"):
                setattr(
                    parent,
                    name,
                    QuantLinear(quantize(linear.weight, "int8", name)._replace(bias=linear.bias), torch.float32),
                )
    merge_linears(paged)
    quant_linears.quant_linears(paged)
    graphs = check_compiled(stock, paged, [fuse_rope, fuse_rows, fuse_linears], MIXED)
    called = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    fused = [node for node in called if node.target is torch.ops.pagegraph.norm_repacked_linear]
    assert (
        sorted(node.args[11] is not None for node in fused) == [False] * 3 + [True] * 4
    )  # qkv, but for the first layer's; the other two
    assert [len(node.args) for node in called if node.target is torch.ops.pagegraph.repacked_linear] == [8] * 5
    assert not [
        node for node in called if node.target in (torch.ops.pagegraph.silu_mul, torch.ops.pagegraph.add_rms_norm)
    ][1:]  # the last norm
