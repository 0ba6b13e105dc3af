"""Merged projections compute what the separate ones did, in the same memory, in one graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pagegraph.compiler.model.forward_local import forward_local
from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.modules import merge_linears as module
from pagegraph.compiler.passes.modules.merge_linears import LinearPart, MergedLinear, merge_linears
from pagegraph.compiler.passes.registry import apply_module_passes
from tests.compiler.architectures import SIZES, tiny_config


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model.requires_grad_(False)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the distinct storages behind the parameters."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def siblings() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(16, size) for size in (8, 4, 4)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "qwen3_moe", "deepseek_v3", "stablelm"])
def test_logits_and_bytes_stay(name: str) -> None:
    model = random_model(name)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 21), generator=torch.Generator().manual_seed(1))
    expected, before = model(ids, use_cache=False).logits, parameter_bytes(model)
    (report,) = apply_module_passes(model, PassOptions(merge_linears=True, skinny_linears=False, rotary_once=False))
    assert report.name == "merge_linears"
    assert report.changes >= SIZES["num_hidden_layers"]
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    assert parameter_bytes(model) == before


def test_llama_merges_two_groups_a_layer() -> None:
    model = random_model("llama")
    assert merge_linears(model) == 2 * SIZES["num_hidden_layers"]
    left = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is nn.Linear}
    assert left == {"o_proj", "down_proj", "lm_head"}


def test_switched_off_changes_nothing() -> None:
    model = random_model("llama")
    assert apply_module_passes(model, PassOptions(merge_linears=False, skinny_linears=False, rotary_once=False)) == []
    assert not any(isinstance(m, MergedLinear) for m in model.modules())


@pytest.fixture
def in_a_forward() -> Iterator[None]:
    """As within the forward of a wrapped model."""
    forward_local.products = {}
    yield
    assert forward_local.products == {}, "a product outlived its last part"
    forward_local.products = None


def count_products(merged: MergedLinear, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made, product = [], merged.product
    monkeypatch.setattr(merged, "product", lambda *given: made.append(1) or product(*given))
    return made


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_in_any_order_are_of_one_product(
    in_a_forward: None, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = siblings()
    merged = MergedLinear(linears)
    made = count_products(merged, monkeypatch)
    parts = [LinearPart(merged, index) for index in range(3)]
    for states in torch.randn(3, 5, 16):
        for index in order:
            torch.testing.assert_close(parts[index](states), linears[index](states))
    assert len(made) == 3


@pytest.mark.parametrize("order", [(1, 1, 0), (0, 2, 2), (0, 1, 2)])
def test_parts_asked_for_again_and_outside_of_a_forward(order: tuple[int, ...]) -> None:
    linears = siblings()
    parts = [LinearPart(MergedLinear(linears), index) for index in range(3)]
    for products in ({}, None):
        forward_local.products = products
        for states in torch.randn(3, 5, 16):
            for index in order:
                torch.testing.assert_close(parts[index](states), linears[index](states))
    assert forward_local.products is None


def test_nothing_is_kept_on_the_module(in_a_forward: None) -> None:
    merged = MergedLinear(siblings())
    before = dict(vars(merged))
    states = torch.randn(2, 16)
    for index in (1, 0, 2):
        merged.part(states, index)
        assert vars(merged) == before


def test_parts_of_another_input_are_not_handed_out() -> None:
    linears = siblings()
    merged = MergedLinear(linears)
    forward_local.products = {}
    merged.part(torch.randn(2, 16), 0)
    states = torch.randn(2, 16)
    torch.testing.assert_close(merged.part(states, 1), linears[1](states))
    forward_local.products = None


def test_unlike_siblings_stay() -> None:
    parent = nn.Module()
    parent.gate_proj, parent.up_proj = nn.Linear(8, 4, bias=True), nn.Linear(8, 4, bias=False)
    parent.q_proj, parent.k_proj, parent.v_proj = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(6, 4)
    assert merge_linears(parent) == 0
    assert type(parent.gate_proj) is nn.Linear


def test_a_wrong_merge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the numerical check."""
    honest = MergedLinear.__init__

    def swapped(self: MergedLinear, linears: list[nn.Linear]) -> None:
        honest(self, [linears[0], *linears[:0:-1]])

    monkeypatch.setattr(module.MergedLinear, "__init__", swapped)
    with pytest.raises(ArithmeticError, match="q_proj"):
        merge_linears(random_model("llama"))


def test_is_one_graph_with_one_product_a_group() -> None:
    model = random_model("llama")
    ids = torch.randint(3, SIZES["vocab_size"], (1, 13))
    expected = model(ids, use_cache=False).logits
    merge_linears(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def forward(ids: torch.Tensor) -> torch.Tensor:
        forward_local.products = {}
        try:
            return model(ids, use_cache=False).logits
        finally:
            forward_local.products = None

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(compiled(ids), expected, atol=1e-5, rtol=1e-5)
    compiled(torch.cat([ids, ids], dim=1))
    assert len(graphs) == 1
    products = [n for n in graphs[0].graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
    assert len(products) == 4 * SIZES["num_hidden_layers"] + 1
    (output,) = [n for n in graphs[0].graph.nodes if n.op == "output"]
    assert len(output.args[0]) == 1


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))


def test_compiles_while_another_thread_runs_the_same_modules(impatient_threads: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Mlp() for _ in range(12)]).requires_grad_(False)
    states = torch.randn(3, 16)
    expected = model(states)
    assert merge_linears(model) == 12
    stop, wrong = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            if not torch.allclose(model(states), expected, atol=1e-5):
                wrong.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graph.forward)
            torch.testing.assert_close(compiled(states), expected, atol=1e-5, rtol=1e-5)
    finally:
        stop.set()
        thread.join()
    assert not wrong
