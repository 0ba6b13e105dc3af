"""Routers as one op: found where softmax shares, and the same logits; others are left alone."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from pagegraph.compiler.inductor.compile import compile_forward
from pagegraph.compiler.passes.graph.fuse_norms import fuse_rows
from pagegraph.compiler.passes.graph.fuse_routers import fuse_routers
from pagegraph.compiler.step.forward import mark_dynamic
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import CHUNKED, check_compiled, paged_copy, prompts_for, random_model
from tests.compiler.paged_run import run_paged

ops = torch.ops.pagegraph
# How many of the layers have such a router, and whether the k largest share the whole.
FOUND = {
    "qwen3_moe": (4, False),
    "mixtral": (4, True),
    "gpt_oss": (4, True),
    "olmoe": (4, False),
    "deepseek_v3": (0, None),
}


OFTEN = {"qwen3_moe", "deepseek_v3"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in FOUND])
def test_logits_stay_and_routers_are_found(name: str) -> None:
    config = tiny_config(name)
    stock = random_model(config)
    (graph,) = check_compiled(stock, paged_copy(config, stock), [fuse_rows, fuse_routers], CHUNKED)
    found = [node for node in graph.graph.nodes if node.target is ops.topk_softmax]
    count, renormalize = FOUND[name]
    assert len(found) == min(count, config.num_hidden_layers) and {node.args[2] for node in found} <= {renormalize}
    left = [node for node in graph.graph.nodes if node.target in (torch.topk, "topk")]
    assert bool(left) == (count == 0)


def traced(router) -> torch.fx.GraphModule:
    """What the compiler traces of a function of logits [8, 16] in bfloat16."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(router, backend=keep, fullgraph=True)(torch.randn(8, 16).bfloat16())
    return graphs[0]


def rounded_first(logits):
    return torch.topk(torch.softmax(logits, -1), 4, dim=-1)


def read_twice(logits):
    values, chosen = torch.topk(torch.softmax(logits.float(), -1), 4, dim=-1)
    return values / values.sum(-1, keepdim=True), values, chosen


def smallest(logits):
    return torch.topk(torch.softmax(logits.float(), -1), 4, dim=-1, largest=False)


def over_tokens(logits):
    return torch.topk(torch.softmax(logits.float(), 0), 4, dim=-1)


def not_shared(logits):
    values, chosen = torch.topk(logits, 4, dim=-1)
    return values.sigmoid(), chosen


@pytest.mark.parametrize("router", [rounded_first, smallest, over_tokens, not_shared])
def test_other_forms_are_left(router) -> None:
    assert fuse_routers(traced(router)) == 0


def test_values_that_are_read_besides_stay_the_values() -> None:
    graph = traced(read_twice)
    logits = torch.stack([torch.randperm(16) / 4 for _ in range(8)]).bfloat16()  # no two alike
    expected = graph(logits)
    assert fuse_routers(graph) == 1
    for got, wanted in zip(graph(logits), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    (found,) = [node for node in graph.graph.nodes if node.target is ops.topk_softmax]
    assert found.args[2] is False


@pytest.mark.usefixtures("graphs_anew")
def test_no_size_becomes_a_constant() -> None:
    """One graph for all numbers of tokens, as the compiler sees it: a pass's ops must not fix any."""
    config = tiny_config("qwen3_moe")
    paged = paged_copy(config, random_model(config))
    compiled = compile_forward(paged, [fuse_rows, fuse_routers], backend=aot_eager)

    def forward(*inputs):
        mark_dynamic(*inputs[:8])
        return compiled(*inputs)

    torch._dynamo.reset()
    with torch.inference_mode():
        run_paged(forward, paged, prompts_for(config.vocab_size), CHUNKED)
