"""Rows of linear, norm, linear, gate as one op: found where they have the known form, and the same logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from compiler import lower
from compiler.passes.fuse_linears import fuse_linears
from compiler.passes.fuse_rope import fuse_rope
from compiler.passes.fuse_rows import fuse_rows
from compiler.passes.merge_linears import merge_linears
from compiler.passes.skinny_linears import skinny_linears

sys.path.insert(0, str(Path(__file__).parent))
from architectures import SIZES, tiny_config  # noqa: E402
from paged_run import run_paged  # noqa: E402
from test_capture import MIXED, captured_copy, prompts_for, random_model, stock_logits  # noqa: E402

# (with a gate, without) of a model of four layers: the last product of the last layer meets a norm, but rows are picked behind it
FOUND = {
    "llama": (4, 3),
    "qwen3": (4, 3),
    "qwen2": (4, 3),  # products with a bias
    "mixtral": (0, 0),  # behind the norm a router and experts read
    "olmo2": (0, 0),  # norms stand behind the products
}


@pytest.mark.parametrize("name", FOUND)
def test_logits_stay_and_the_known_forms_are_found(name: str) -> None:
    stock = random_model(tiny_config(name))
    captured = captured_copy(tiny_config(name), stock)
    merge_linears(captured)
    assert skinny_linears(captured, "cpu") > 0
    graphs: list[torch.fx.GraphModule] = []

    def kept(module: torch.fx.GraphModule) -> int:
        graphs.append(module)
        return 0

    torch._dynamo.reset()
    passes = [fuse_rope, fuse_rows, fuse_linears, kept]
    compiled = lower.compile_forward(captured, passes, backend=lambda module, inputs: module.forward)

    def forward(*inputs):
        lower.mark_dynamic(*inputs[:7])
        return compiled(*inputs)

    prompts = prompts_for(SIZES["vocab_size"])
    expected = stock_logits(stock, prompts)
    with torch.inference_mode():
        got = run_paged(forward, captured.layouts, prompts, MIXED)
    for sequence, by_position in enumerate(got):
        for position, logits in by_position.items():
            torch.testing.assert_close(logits, expected[sequence][position], atol=1e-4, rtol=0)
    fused = [node for node in graphs[0].graph.nodes if node.target is torch.ops.pagegraph.linear_norm_linear]
    gated = sum(node.args[-2] for node in fused)
    assert (gated, len(fused) - gated) == FOUND[name]
