"""Norms and gated SiLU as ops: found where they have the known form, and the same logits in every architecture."""

from __future__ import annotations

import pytest
import torch

from pagegraph.compiler.passes.graph.fuse_norms import fuse_rows
from pagegraph.compiler.passes.graph.fuse_rope import fuse_rope
from pagegraph.compiler.passes.modules.merge_linears import merge_linears
from tests.compiler.architectures import ARCHITECTURES, tiny_config
from tests.compiler.model.test_paged import MIXED, check_compiled, paged_copy, random_model

# (add_rms_norm, rms_norm, silu_mul) of a model of four layers
FOUND = {
    "nemotron_h": (4, 1, 0),
    "llama": (8, 1, 4),
    "qwen3": (8, 1, 4),
    "qwen2": (8, 1, 4),
    "mistral_window": (8, 1, 4),
    "mixtral": (8, 1, 0),
    "gemma2": (0, 0, 0),
    "gpt2": (0, 0, 0),
}
OFTEN = {"llama", "gemma2", "deepseek_v3", "nemotron_h"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in ARCHITECTURES])
def test_logits_stay_and_the_known_forms_are_found(name: str) -> None:
    stock = random_model(tiny_config(name))
    paged = paged_copy(tiny_config(name), stock)
    merge_linears(paged)
    graphs = check_compiled(stock, paged, [fuse_rope, fuse_rows], MIXED)
    if name in FOUND:
        ops = torch.ops.pagegraph
        targets = [node.target for node in graphs[0].graph.nodes]
        assert tuple(targets.count(op) for op in (ops.add_rms_norm, ops.rms_norm, ops.silu_mul)) == FOUND[name]


@pytest.mark.parametrize(
    "name, layers, gate_first", [("nemotron_h", 1, True), ("mamba2", 4, True), ("qwen3_next", 2, False)]
)
def test_norms_with_a_gate_are_one_op(name: str, layers: int, gate_first: bool) -> None:
    stock = random_model(tiny_config(name))
    (graph,) = check_compiled(stock, paged_copy(tiny_config(name), stock), [fuse_rows], MIXED)
    found = [node for node in graph.graph.nodes if node.target is torch.ops.pagegraph.gated_rms_norm]
    assert [node.args[4] for node in found] == [gate_first] * layers
