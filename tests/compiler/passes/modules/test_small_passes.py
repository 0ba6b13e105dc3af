"""The routing of linears and the copy behind rotary embeddings leave logits as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.graph.fuse_norms import fuse_rows
from pagegraph.compiler.passes.modules.merge_linears import MergedLinear, merge_linears
from pagegraph.compiler.passes.modules.rotary_once import rotary_once
from pagegraph.compiler.passes.modules.skinny_linears import SkinnyLinear, skinny_linears
from pagegraph.compiler.passes.modules.wide_norms import wide_norms
from pagegraph.compiler.passes.registry import apply_module_passes
from tests.compiler.architectures import SIZES, tiny_config
from tests.compiler.model.test_paged import MIXED, paged_copy, prompts_for, random_model
from tests.compiler.paged_run import run_paged


def logits_of(paged) -> list[torch.Tensor]:
    with torch.inference_mode():
        got = run_paged(paged, paged, prompts_for(SIZES["vocab_size"]), MIXED)
    return [logits for by_position in got for logits in by_position.values()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "phi"])
def test_rotary_once_keeps_logits(name: str) -> None:
    paged = paged_copy(tiny_config(name), random_model(tiny_config(name)))
    before = logits_of(paged)
    assert rotary_once(paged.model) >= 1
    for mine, theirs in zip(logits_of(paged), before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_models_without_rotary_are_left_alone() -> None:
    assert rotary_once(paged_copy(tiny_config("gpt2"), random_model(tiny_config("gpt2"))).model) == 0


def test_cpu_linears_stay() -> None:
    assert skinny_linears(nn.Sequential(nn.Linear(4, 4))) == 0


def test_routed_linears_compute_the_same() -> None:
    paged = paged_copy(tiny_config("qwen2"), random_model(tiny_config("qwen2")))
    before = logits_of(paged)
    merge_linears(paged.model)
    routed = skinny_linears(paged.model, "cuda")  # the op has a CPU form too
    kinds = [type(m) for m in paged.model.modules()]
    assert (
        routed == kinds.count(SkinnyLinear) + kinds.count(MergedLinear) == 4 * 4 + 1
    )  # qkv, o, gate_up, down; lm_head
    for mine, theirs in zip(logits_of(paged), before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_no_linear_leaves_the_op_that_deterministic_gave_it() -> None:
    paged = paged_copy(tiny_config("qwen2"), random_model(tiny_config("qwen2")))
    options = PassOptions(merge_linears=True, deterministic=True, skinny_linears=True, rotary_once=False)
    apply_module_passes(paged.model, options, "cuda")
    modules = list(paged.model.modules())
    merged = [module for module in modules if isinstance(module, MergedLinear)]
    assert merged and all(module.product is torch.ops.pagegraph.fixed_linear for module in merged)
    assert not any(type(module) in (nn.Linear, SkinnyLinear) for module in modules)


@pytest.mark.parametrize(("name", "widened"), [("gpt_oss", True), ("llama", False), ("gemma3", True)])
def test_norms_that_round_once_hold_their_weight_in_float32(name: str, widened: bool) -> None:
    """Those whose bits do not change by it; nowhere but where kernels of ours take norms."""
    model = random_model(tiny_config(name)).bfloat16()
    norms = [one for one in model.modules() if type(one).__name__.endswith("RMSNorm")]
    rows = [torch.randn(1, 3, len(one.weight)).bfloat16() for one in norms]
    before = [one(x) for one, x in zip(norms, rows)]
    assert wide_norms(model) == 0
    assert wide_norms(model, "cuda") == (len(norms) if widened else 0)
    assert all(one.weight.dtype == (torch.float32 if widened else torch.bfloat16) for one in norms)
    assert all(torch.equal(one(x), expected) for one, x, expected in zip(norms, rows, before, strict=True))


def test_a_norm_that_rounds_once_becomes_a_kernel_of_ours() -> None:
    """In bfloat16, where its weight has another dtype than its rows; the same bits by the reference."""
    norm = random_model(tiny_config("gpt_oss")).bfloat16().model.layers[0].input_layernorm
    assert wide_norms(nn.Sequential(norm), "cuda") == 1
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        assert fuse_rows(graph) == 1
        graphs.append(graph)
        return graph

    def added(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return total, norm(total)

    torch._dynamo.reset()
    given = [torch.randn(1, 5, len(norm.weight)).bfloat16() for _ in range(2)]
    with torch.no_grad():
        found = torch.compile(added, backend=keep, fullgraph=True)(*given)
        assert all(torch.equal(one, other) for one, other in zip(found, added(*given)))
    assert [node.target for node in graphs[0].graph.nodes].count(torch.ops.pagegraph.add_rms_norm) == 1
