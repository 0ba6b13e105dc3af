"""Rows of linear, norm, linear, gate as one op: found where they have the known form, and the same logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from compiler.passes.fuse_linears import fuse_linears
from compiler.passes.fuse_rope import fuse_rope
from compiler.passes.fuse_rows import fuse_rows
from compiler.passes.merge_linears import merge_linears
from compiler.passes.skinny_linears import skinny_linears

sys.path.insert(0, str(Path(__file__).parent))
from architectures import tiny_config  # noqa: E402
from test_capture import MIXED, captured_copy, check_compiled, random_model  # noqa: E402

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
    graphs = check_compiled(stock, captured, [fuse_rope, fuse_rows, fuse_linears], MIXED)
    fused = [node for node in graphs[0].graph.nodes if node.target is torch.ops.pagegraph.linear_norm_linear]
    gated = sum(node.args[-2] for node in fused)
    assert (gated, len(fused) - gated) == FOUND[name]
