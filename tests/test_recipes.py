"""The recipes "add a pass" and "add an op" of CONTRIBUTING.md, followed on toys."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pagegraph.compiler.passes import registry
from pagegraph.kernels import ops

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
        captured = torch.compile(lambda x: op(x, 2.0) + 1, fullgraph=True, backend="eager")
        assert torch.equal(captured(torch.ones(3)), torch.full((3,), 3.0))
    finally:
        library._destroy()
