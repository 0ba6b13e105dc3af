"""Graphs called past Dynamo: the same results, and back to Dynamo where a graph is not for the inputs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from pagegraph.compiler.inductor.guard_free import Forward
from pagegraph.compiler.model.paged import Forwarded


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 3))

    def forward(self, ids: torch.Tensor, table: torch.Tensor, caches: list[torch.Tensor]) -> Forwarded:
        rows = self.weight[ids] * table.shape[1] + table.sum() + caches[0]
        return rows * 2 if ids.shape[0] > 6 else rows - 1, rows


@pytest.fixture
def forward() -> Forward:
    torch._dynamo.reset()
    toy = Toy()
    forward = Forward(toy, lambda module, traced: module.forward)
    forward.toy = toy
    forward.traced = []
    traced = forward._traced
    forward._traced = lambda *inputs: forward.traced.append(len(inputs[0])) or traced(*inputs)
    return forward


def check(forward: Forward, size: int, width: int, caches: list[torch.Tensor], dynamic: bool = True) -> None:
    ids, table = torch.arange(size), torch.arange(2.0 * width).view(2, width)
    if size > 1 and dynamic:
        torch._dynamo.mark_dynamic(ids, 0)
    torch._dynamo.mark_dynamic(table, 1)
    with torch.inference_mode():
        weight = forward.toy.weight
        expected = weight[ids] * width + table.sum() + caches[0]
        logits, hidden = forward(ids, table, caches)
        assert torch.equal(logits, expected * 2 if size > 6 else expected - 1)
        assert torch.equal(hidden, expected)


def test_each_kind_is_traced_once(forward: Forward) -> None:
    caches = [torch.ones(3)]
    for size, width in ((3, 4), (5, 7), (1, 4), (4, 5), (1, 9), (2, 2)):
        check(forward, size, width, caches)
    assert forward.traced == [3, 1]


def test_sizes_beyond_a_graphs_conditions_are_traced(forward: Forward) -> None:
    caches = [torch.ones(3)]
    for size in (3, 8, 4, 9):
        check(forward, size, 4, caches)
    assert forward.traced[:2] == [3, 8]


def test_a_size_that_was_a_constant_to_the_compiler_stays_one(forward: Forward) -> None:
    caches = [torch.ones(3)]
    for size in (3, 3, 5, 3):
        check(forward, size, 4, caches, dynamic=False)
    assert forward.traced[:2] == [3, 5]


def test_other_caches_are_not_taken_for_those_that_are_kept(forward: Forward) -> None:
    for value in (1.0, 2.0):
        check(forward, 3, 4, [torch.full((3,), value)])
        check(forward, 4, 4, [torch.full((3,), value)])
    assert forward.traced == [3, 4, 3, 4]


def test_threads_keep_their_own_calls_apart(forward: Forward, impatient_threads: None) -> None:
    caches = [torch.ones(3)]
    traced = forward._traced
    both_called = threading.Barrier(2, timeout=60)

    def traced_together(*inputs: object) -> torch.Tensor:
        out = traced(*inputs)
        both_called.wait()
        return out

    check(forward, 3, 4, caches)
    check(forward, 1, 4, caches)
    forward._graphs.clear()
    forward._traced = traced_together
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda size: check(forward, size, 4, caches), (3, 1)))
    for size in (5, 1):
        check(forward, size, 6, caches)


def test_caches_of_a_second_model_have_sizes_of_their_own() -> None:
    """Dynamo makes a size that changed a symbol; kernels are built for the sizes of a model's caches."""
    torch._dynamo.reset()
    sizes = []

    def noted(module: torch.fx.GraphModule, traced: list) -> torch.fx.GraphModule:
        inputs = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        sizes.extend(one.shape[0] for one in inputs if isinstance(one, torch.Tensor) and one.dim() == 3)
        return module

    for size in (5, 7, 9):
        with torch.inference_mode():
            Forward(Toy(), noted)(torch.arange(1), torch.ones(2, 4), [torch.ones(size, 1, 3)])
    assert [type(size) for size in sizes] == [int] * 3 and sizes == [5, 7, 9]
