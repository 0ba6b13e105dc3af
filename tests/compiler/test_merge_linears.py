"""Merged projections compute what the separate ones did, in the same memory, in one graph."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compiler.passes import merge_linears as module
from compiler.passes import registry
from compiler.passes.merge_linears import LinearPart, MergedLinear, merge_linears

sys.path.insert(0, str(Path(__file__).parent))
from architectures import SIZES, tiny_config  # noqa: E402


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
    (report,) = registry.apply(model, SimpleNamespace(merge_linears=True, skinny_linears=False, rotary_once=False, round_activations=True))
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
    assert registry.apply(model, SimpleNamespace(merge_linears=False, skinny_linears=False, rotary_once=False, round_activations=True)) == []
    assert not any(isinstance(m, MergedLinear) for m in model.modules())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 0), (0, 2, 2)])
def test_parts_in_any_order(order: tuple[int, ...]) -> None:
    linears = siblings()
    merged = MergedLinear(linears)
    parts = [LinearPart(merged, index) for index in range(3)]
    for states in torch.randn(3, 5, 16):
        for index in order:
            torch.testing.assert_close(parts[index](states), linears[index](states))


def test_nothing_is_kept_after_the_last_part() -> None:
    merged = MergedLinear(siblings())
    states = torch.randn(2, 16)
    for index in (1, 0, 2):
        merged.part(states, index)
    assert merged.source is None
    assert merged.slices == []


def test_an_unfinished_forward_does_not_leak_into_the_next() -> None:
    linears = siblings()
    merged = MergedLinear(linears)
    merged.part(torch.randn(2, 16), 0)
    states = torch.randn(2, 16)
    torch.testing.assert_close(merged.part(states, 1), linears[1](states))


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

    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(compiled(ids), expected, atol=1e-5, rtol=1e-5)
    compiled(torch.cat([ids, ids], dim=1))
    assert len(graphs) == 1
    products = [n for n in graphs[0].graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
    assert len(products) == 4 * SIZES["num_hidden_layers"] + 1
    (output,) = [n for n in graphs[0].graph.nodes if n.op == "output"]
    assert len(output.args[0]) == 1
