"""Mixtures through `pagegraph::experts`, in float32 against transformers' own forward; and those that do not ask for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from pagegraph.compiler.model.experts import form_of
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, wrap_model
from pagegraph.compiler.model.weights import load_weights
from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.registry import apply_module_passes
from pagegraph.kernels.moe.form import Form
from tests.compiler.architectures import SIZES, tiny_config
from tests.compiler.model.every_type import tiny
from tests.compiler.model.test_paged import (
    CHUNKED,
    MIXED,
    WHOLE,
    check_compiled,
    paged_copy,
    prompts_for,
    random_model,
    stock_logits,
)
from tests.compiler.paged_run import run_paged

# Layers of experts at tiny size, of four.
ALL, BUT_THE_FIRST = 4, 3
THROUGH = {
    "afmoe": BUT_THE_FIRST,
    "deepseek_v2": BUT_THE_FIRST,
    "deepseek_v3": BUT_THE_FIRST,
    "dots1": BUT_THE_FIRST,
    "ernie4_5_moe": BUT_THE_FIRST,
    "glm4_moe": BUT_THE_FIRST,
    "gpt_oss": ALL,
    "granitemoe": ALL,
    "granitemoeshared": ALL,
    "hy_v3": BUT_THE_FIRST,
    "minimax_m2": ALL,
    "minimax_m3_vl_text": ALL,
    "mixtral": ALL,
    "olmoe": ALL,
    "phimoe": ALL,
    "qwen2_moe": ALL,
    "qwen3_moe": ALL,
}


class Calls(TorchDispatchMode):
    """How often the op is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.pagegraph.experts.default
        return func(*args, **(kwargs or {}))


def gemma4() -> PretrainedConfig:
    own = dict(head_dim=16, global_head_dim=16, num_global_key_value_heads=2, sliding_window=9, num_kv_shared_layers=0)
    small = dict(vocab_size_per_layer_input=128, hidden_size_per_layer_input=0)
    moe = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=48)
    kinds = ["sliding_attention", "full_attention"] * 2
    return AutoConfig.for_model("gemma4_text", **SIZES, **own, **small, **moe, layer_types=kinds)


def check(config: Callable[[], PretrainedConfig], layers: int) -> None:
    stock = random_model(config())
    paged = paged_copy(config(), stock)
    apply_module_passes(paged.model, PassOptions())
    prompts = prompts_for(SIZES["vocab_size"])
    expected = stock_logits(stock, prompts)
    bound = 1e-4 * max(1.0, max(one.abs().max().item() for one in expected) / 5)
    for schedule in (WHOLE, CHUNKED, MIXED):
        with torch.inference_mode(), Calls() as calls:
            got = run_paged(paged, paged, prompts, schedule)
        assert calls.count == layers * len(schedule)
        for sequence, by_position in enumerate(got):
            for position, logits in by_position.items():
                torch.testing.assert_close(logits, expected[sequence][position], atol=bound, rtol=0)


@pytest.mark.parametrize("kind", THROUGH)
@torch.inference_mode()
def test_goes_through_the_op(kind: str) -> None:
    def config() -> PretrainedConfig:
        made = tiny(kind)
        if kind == "minimax_m3_vl_text":  # which attends sparsely as it is published
            made.layer_types = ["full_attention"] * made.num_hidden_layers
        return made

    check(config, THROUGH[kind])


@torch.inference_mode()
def test_gemma4_with_experts_goes_through_the_op() -> None:
    check(gemma4, ALL)


@torch.inference_mode()
def test_llama4_does_not_ask_and_is_right() -> None:
    check(lambda: tiny_config("llama4"), 0)


def test_is_one_full_graph() -> None:
    """The op stands in it once a layer, with no shape that depends on what was chosen."""
    config = tiny_config("qwen3_moe")
    stock = random_model(config)
    (graph,) = check_compiled(stock, paged_copy(config, stock), [], CHUNKED)
    assert sum("pagegraph.experts" in str(node.target) for node in graph.graph.nodes) == config.num_hidden_layers


def of_mixtral(hidden_act: str = "silu", gate: Callable | None = None, **values: float) -> torch.nn.Module:
    sizes = dict(SIZES, num_local_experts=4, hidden_act=hidden_act)
    with torch.device("meta"):
        module = MixtralExperts(AutoConfig.for_model("mixtral", **sizes))
    for name, value in values.items():
        setattr(module, name, value)
    if gate is not None:
        module._apply_gate = gate
    return module


@pytest.mark.parametrize(
    ("name", "activation"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2")]
)
def test_an_activation_is_found(name: str, activation: str) -> None:
    assert form_of(of_mixtral(name)) == Form(activation)


def test_a_limit_is_found_however_large() -> None:
    def gate(product: torch.Tensor) -> torch.Tensor:
        gate, up = product.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=50.0)) * up.clamp(-50.0, 50.0)

    assert form_of(of_mixtral(gate=gate, limit=50.0)) == Form(limit=50.0)


@pytest.mark.parametrize("hidden_act", ["tanh", "leaky_relu"])
def test_an_activation_that_the_op_does_not_know_is_left_alone(hidden_act: str) -> None:
    """And the model is right."""
    assert form_of(of_mixtral(hidden_act)) is None
    with torch.inference_mode():
        check(lambda: tiny_config("mixtral", hidden_act=hidden_act), 0)


def test_a_gate_that_the_op_does_not_know_is_left_alone() -> None:
    assert form_of(of_mixtral(gate=lambda product: product.chunk(2, -1)[0])) is None
    assert form_of(of_mixtral(gate=lambda product: product @ torch.empty(96, device="meta"))) is None


@torch.inference_mode()
def test_a_checkpoint_of_single_experts_is_stacked(tmp_path: Path) -> None:
    """transformers builds the model once more for that, by the configuration that names our function."""
    config = tiny_config("qwen3_moe")
    stock = random_model(config)
    stock.save_pretrained(tmp_path)
    paged = wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256))
    load_weights(paged.model, tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    prompts = prompts_for(SIZES["vocab_size"])
    expected = stock_logits(stock, prompts)
    for sequence, by_position in enumerate(run_paged(paged, paged, prompts, WHOLE)):
        for position, logits in by_position.items():
            torch.testing.assert_close(logits, expected[sequence][position], atol=1e-4, rtol=0)
