"""Recipes of CONTRIBUTING.md: "add a pass" and "add an op" on toys, "add a sampling parameter" for each there is."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pagegraph.compiler.passes import registry
from pagegraph.compiler.step.dummy import everything
from pagegraph.compiler.step.inputs import SamplingInput
from pagegraph.kernels import ops
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.scheduler.sampling_columns import SamplingColumns
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.structured_output import StructuredOutputs
from pagegraph.web.schema import parse_completion

SWITCHES = {row.setting: False for row in registry.PASSES if row.setting} | dict.fromkeys(registry.GRAPH_PASSES, False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.relu(self.dropout(self.first(x))))


def drop_dropout(model: nn.Module) -> int:
    """A toy pass over modules: dropout becomes nothing."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    for parent, name in found:
        setattr(parent, name, nn.Identity())
    return len(found)  # fmt: skip


def relu_once(module: torch.fx.GraphModule) -> int:
    """A toy pass over the graph: relu of relu is relu."""
    twice = [node for node in module.graph.nodes if node.target is torch.relu and node.args[0].target is torch.relu]
    for node in twice:
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.recompile()
    return len(twice)


def test_add_a_pass_over_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PASSES", (*registry.PASSES, registry.Pass("drop_dropout", drop_dropout)))
    options = {name: True for row in registry.PASSES for name in row.options}
    model = Model()
    reports = registry.apply_module_passes(model, SimpleNamespace(**SWITCHES, **options, drop_dropout=True))
    assert [(report.name, report.changes) for report in reports] == [("drop_dropout", 1)]
    x = torch.randn(2, 4)
    assert torch.equal(model(x), torch.relu(model.first(x)))
    assert not registry.apply_module_passes(Model(), SimpleNamespace(**SWITCHES, **options, drop_dropout=False))


def test_add_a_pass_over_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.GRAPH_PASSES, "relu_once", relu_once)
    passes = registry.graph_passes(SimpleNamespace(**SWITCHES, relu_once=True), torch.device("cuda"))
    assert passes == [relu_once]
    model = Model().eval()
    graph = torch.fx.symbolic_trace(model)
    assert [run(graph) for run in passes] == [1]
    x = torch.randn(2, 4)
    assert torch.equal(graph(x), model(x))


def scaled(x: Tensor, by: float) -> Tensor:
    """x * by, of x's shape and dtype."""
    return x * by


@pytest.mark.parametrize("cuda", [ops.SAME, None, "toy.kernel:scaled"])
def test_add_an_op(cuda: str | None) -> None:
    row = ops.Op("scaled(Tensor x, float by) -> Tensor", scaled, cuda, lambda x, by: torch.empty_like(x))
    library = torch.library.Library("pagegraph_toy", "DEF")
    try:
        ops.register(row, library)
        op = torch.ops.pagegraph_toy.scaled
        torch.library.opcheck(op.default, (torch.randn(3, 4), 2.0), test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(lambda x: op(x, 2.0) + 1, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    finally:
        library._destroy()


# Every sampling parameter, with a value that is not its default, as JSON has it.
SAMPLING: dict[str, Any] = {
    "max_tokens": 5,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"3": 1.0},
    "allowed_token_ids": [1, 2],
    "seed": 4,
    "stop_token_ids": [6],
    "ignore_eos": True,
    "logprobs": 2,
    "structured_outputs": {"regex": "a+"},
    "prompt_logprobs": 2,
}
# What a plain step has too: the host's own, and what is applied inside the graph.
IN_EVERY_STEP = {"max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "temperature", "seed"}


def test_add_a_sampling_parameter_to_requests() -> None:
    names = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert set(SAMPLING) | {"pooling"} == names  # an embedding has an endpoint of its own
    default = SamplingParams()
    for name, value in SAMPLING.items():
        params = parse_completion({"prompt": "Hello", name: value}, 16).params
        wanted = {int(key): one for key, one in value.items()} if name == "logit_bias" else value
        wanted = StructuredOutputs(**value) if name == "structured_outputs" else wanted
        assert getattr(params, name) == wanted != getattr(default, name), name


IN_PROMPTS = {"prompt_logprobs"}  # nothing is sampled by it: `Sequence.prompt` says what is asked


@pytest.mark.parametrize("name", sorted(set(SAMPLING) - IN_EVERY_STEP - IN_PROMPTS))
def test_add_a_sampling_parameter_to_the_columns(name: str) -> None:
    params = parse_completion({"prompt": "Hello", name: SAMPLING[name]}, 16).params
    columns, slots = SamplingColumns(1), np.zeros(1, np.int32)
    columns.enter(0, Sequence("", np.zeros(1, np.int32), params, frozenset(), 0, 8))
    asked = columns.has_extras[0] or columns.has_grammar[0] or not columns.of(slots).is_plain
    assert asked, "the slot does not ask for it"
    columns.enter(0, Sequence("", np.zeros(1, np.int32), SamplingParams(), frozenset(), 0, 8))
    assert not columns.has_extras[0] and not columns.has_grammar[0] and columns.of(slots).is_plain, (
        "a slot that does not ask pays for it"
    )


def test_a_step_that_asks_for_any_sampling_parameter_is_not_plain() -> None:
    full = everything(2)
    plain = SamplingInput(full.temperature, full.seeds)
    assert plain.is_plain
    for field in fields(SamplingInput):
        if field.name not in ("temperature", "seeds", "penalty_reset"):  # resets come with penalties
            assert not replace(plain, **{field.name: getattr(full, field.name)}).is_plain, field.name
