"""The fused rotation: found in the architectures that have it, and the same logits with it in every architecture."""

from __future__ import annotations

import pytest
import torch

from pagegraph.compiler.passes.graph.fuse_rope import fuse_rope
from tests.compiler.architectures import ARCHITECTURES, tiny_config
from tests.compiler.model.test_paged import MIXED, check_compiled, paged_copy, random_model

ROTATED = {
    "llama", "llama3_rope", "llama_yarn", "llama_linear", "mistral_window", "qwen2", "qwen2_window", "gemma", "gemma2",
    "granite", "starcoder2", "mixtral", "qwen3_moe", "olmoe", "qwen3", "gpt_oss",
}  # fmt: skip
NORMED = {"qwen3", "qwen3_moe", "lfm2"}


OFTEN = {"llama", "qwen3", "gemma3", "cohere2", "deepseek_v3", "gpt_oss"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in ARCHITECTURES])
def test_logits_stay_and_the_known_forms_are_found(name: str) -> None:
    config = tiny_config(name)
    stock = random_model(config)
    paged = paged_copy(tiny_config(name), stock)
    found: list[int] = []

    def counted(module: torch.fx.GraphModule) -> int:
        found.append(fuse_rope(module))
        return found[-1]

    graphs = check_compiled(stock, paged, [counted], MIXED)
    if name in ROTATED:
        assert set(found) == {len(paged.layouts)}
    ops = [n for n in graphs[0].graph.nodes if n.target is torch.ops.pagegraph.rope_attention]
    assert all((n.args[5] is not None) == (name in NORMED) for n in ops)
