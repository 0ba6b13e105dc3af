"""Norms and gated SiLU as ops: found where they have the known form, and the same logits in every architecture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from compiler import lower
from compiler.passes.fuse_rope import fuse_rope
from compiler.passes.fuse_rows import fuse_rows
from compiler.passes.merge_linears import merge_linears

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, SIZES, tiny_config  # noqa: E402
from paged_run import run_paged  # noqa: E402
from test_capture import MIXED, captured_copy, prompts_for, random_model, stock_logits  # noqa: E402

# (add_rms_norm, rms_norm, silu_mul) of a model of four layers
FOUND = {
    "llama": (8, 1, 4),
    "qwen3": (8, 1, 4),
    "qwen2": (8, 1, 4),
    "mistral_window": (8, 1, 4),
    "mixtral": (8, 1, 0),
    "gemma2": (0, 0, 0),
    "gpt2": (0, 0, 0),
}
OFTEN = {"llama", "qwen3", "olmo2", "gemma2", "glm4", "deepseek_v3"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in ARCHITECTURES])
def test_logits_stay_and_the_known_forms_are_found(name: str) -> None:
    stock = random_model(tiny_config(name))
    captured = captured_copy(tiny_config(name), stock)
    merge_linears(captured)
    graphs: list[torch.fx.GraphModule] = []

    def kept(module: torch.fx.GraphModule) -> int:
        graphs.append(module)
        return 0

    torch._dynamo.reset()
    compiled = lower.compile_forward(captured, [fuse_rope, fuse_rows, kept], backend=lambda module, inputs: module.forward)

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
    if name in FOUND:
        ops = torch.ops.pagegraph
        targets = [node.target for node in graphs[0].graph.nodes]
        assert tuple(targets.count(op) for op in (ops.add_rms_norm, ops.rms_norm, ops.silu_mul)) == FOUND[name]
