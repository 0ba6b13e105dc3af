"""Projections whose heads lay beside each other give the same in another order, quantised or not; no other model is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pagegraph.compiler.passes.modules.merge_linears import merge_linears
from pagegraph.compiler.passes.modules.plain_columns import METHOD, plain_columns
from pagegraph.compiler.quantization.linear import QuantLinear
from pagegraph.compiler.quantization.online import quantize
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import CHUNKED, check_compiled, paged_copy, random_model


def layers_of(model: nn.Module) -> list:
    return [module for module in model.modules() if hasattr(type(module), METHOD)]


def columns(layer, rows: torch.Tensor) -> list[torch.Tensor]:
    return list(getattr(layer, METHOD)(layer.in_proj_qkvz(rows), layer.in_proj_ba(rows)))


@pytest.mark.parametrize("quantised", [False, True])
def test_each_head_has_its_columns_and_they_lie_in_order(quantised: bool) -> None:
    model = random_model(tiny_config("qwen3_next")).requires_grad_(False)
    stock = layers_of(model)[0]
    if quantised:
        for name in ("in_proj_qkvz", "in_proj_ba"):
            linear = getattr(stock, name)
            setattr(stock, name, QuantLinear(quantize(linear.weight, "int4", name), torch.float32))
    rows = torch.randn(1, 5, stock.hidden_size)
    expected = columns(stock, rows)
    layer = copy.deepcopy(stock)
    assert plain_columns(nn.Sequential(layer)) == 1
    for mine, theirs in zip(columns(layer, rows), expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    query, key, value, gate, *_ = columns(layer, rows)
    joined = torch.cat([part.flatten(2) for part in (query, key, value, gate)], -1)
    torch.testing.assert_close(joined, layer.in_proj_qkvz(rows))
    for mine, theirs in zip(columns(stock, rows), expected, strict=True):  # of the layer that was not brought in order
        assert torch.equal(mine, theirs)
    assert plain_columns(nn.Sequential(layer)) == 0  # once is enough


def test_logits_stay() -> None:
    stock = random_model(tiny_config("qwen3_next"))
    paged = paged_copy(tiny_config("qwen3_next"), stock)
    assert plain_columns(paged) == len(layers_of(stock)) == 2
    assert merge_linears(paged) == 2 + 2 + 4  # projections of either kind of layer, gate and up of shared experts
    check_compiled(stock, paged, [], CHUNKED)


@pytest.mark.parametrize("spoilt", ["hook", "order"])
def test_what_is_not_understood_stays(monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    model = random_model(tiny_config("qwen3_next"))
    layers = layers_of(model)
    if spoilt == "hook":
        for layer in layers:
            layer.in_proj_ba.register_forward_hook(lambda *_: None)
    else:  # a method that gives one column twice
        own = getattr(type(layers[0]), METHOD)
        monkeypatch.setattr(type(layers[0]), METHOD, lambda *given: (*own(*given)[:5], own(*given)[4]))
    before = [one.clone() for one in model.state_dict().values()]
    assert plain_columns(model) == 0
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), before, strict=True))


def test_other_models_and_weights_without_values() -> None:
    assert plain_columns(random_model(tiny_config("kimi_linear"))) == 0
    assert plain_columns(random_model(tiny_config("qwen3_next")).to("meta")) == 2
