"""Lengths that scaled rotary embeddings reach, and frequencies fixed for one length against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.rope import lengths
from pagegraph.compiler.resolve import resolve_max_model_len
from tests.compiler.architectures import ALPHA, SIZES, tiny_config

HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
LONGROPE = dict(
    rope_type="longrope", factor=4.0, short_factor=[1.0] * HALF, long_factor=[1.0 + i for i in range(HALF)],
    original_max_position_embeddings=64,
)  # fmt: skip

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


def llama(**rope) -> PretrainedConfig:
    """Of 256 positions."""
    return AutoConfig.for_model("llama", **SIZES, rope_parameters=dict(rope_theta=1e4) | rope)


@pytest.mark.parametrize(
    "rope, longest, default",
    [
        (dict(rope_type="default"), 256, 256),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), 1024, 1024),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256, 256),
        (dict(rope_type="yarn", factor=4.0), 1024, 1024),
        (dict(rope_type="linear", factor=2.0), 512, 512),
        (dict(rope_type="dynamic", factor=2.0), 512, 256),
        (ALPHA, 256, 256),
        (LLAMA3, 256, 256),
        (LONGROPE, 256, 64),
    ],
)
def test_the_length_is_what_scaling_reaches(rope: dict, longest: int, default: int) -> None:
    config = llama(**rope)
    found = lengths(config)
    assert (found.longest, found.default) == (longest, default)
    assert resolve_max_model_len(None, config) == default
    assert resolve_max_model_len(longest, config) == longest
    with pytest.raises(ValueError, match=f"max_model_len {longest + 1} is above the model's own limit of {longest} "):
        resolve_max_model_len(longest + 1, config)


def test_scaling_of_one_type_of_layer_is_within_the_length() -> None:
    config = tiny_config("gemma3")
    config.rope_parameters["full_attention"] = dict(rope_type="linear", rope_theta=1e6, factor=8.0)
    assert lengths(config).longest == SIZES["max_position_embeddings"]


def test_positions_in_a_table_are_not_scaled() -> None:
    assert lengths(tiny_config("gpt2")).longest == 256


def test_the_refusal_shows_the_arithmetic() -> None:
    config = llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)
    reason = r"limit of 1024 \(original_max_position_embeddings 256 x factor 4 of rope type yarn\); set it to 1024"
    with pytest.raises(ValueError, match=reason):
        resolve_max_model_len(2000, config)


def test_an_unknown_rope_type_is_named() -> None:
    config = llama(rope_type="spiral", factor=2.0)
    with pytest.raises(ValueError, match="rope_type 'spiral' .* known are default, dynamic, linear, llama3, longrope"):
        resolve_max_model_len(None, config)
    with pytest.raises(ValueError, match="rope_type 'spiral'"):
        build_meta(config, torch.float32, "eager", max_model_len=64)


@pytest.mark.parametrize("max_model_len", [48, 512])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_length_dependent_ropes_are_fixed(rope_type: str, max_model_len: int) -> None:
    """The fixed model equals transformers' own on a sequence of max_model_len tokens."""
    config = llama(**(LONGROPE if rope_type == "longrope" else dict(rope_type=rope_type, factor=4.0)))
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.rotary_emb
    fixed = build_meta(config, torch.float32, "eager", max_model_len=max_model_len).model.rotary_emb
    states = torch.zeros(1)
    whole = torch.arange(max_model_len)[None]
    expected, got = stock(states, whole), fixed(states, whole)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(fixed(states, whole[:, :9]), tuple(e[:, :9] for e in expected))


def test_frequencies_of_each_type_of_layer_are_fixed() -> None:
    rope = dict(
        full_attention=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    layer_types = ["sliding_attention", "full_attention"] * 2
    config = AutoConfig.for_model("gemma3_text", **SIZES, layer_types=layer_types, rope_parameters=rope)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.rotary_emb
    fixed = build_meta(config, torch.float32, "eager", max_model_len=512).model.rotary_emb
    whole = torch.arange(512)[None]
    for layer_type in ("full_attention", "sliding_attention"):
        expected = stock(torch.zeros(1), whole, layer_type=layer_type)
        short = fixed(torch.zeros(1), whole[:, :9], layer_type=layer_type)
        torch.testing.assert_close(short, tuple(one[:, :9] for one in expected))


def test_a_models_own_frequencies_stay() -> None:
    """HunYuan's rope type is dynamic, and where `alpha` is given its class has frequencies of its own."""
    config = tiny_config("hunyuan")
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.rotary_emb
    fixed = build_meta(config, torch.float32, "eager", max_model_len=256).model.rotary_emb
    whole = torch.arange(256)[None]
    torch.testing.assert_close(fixed(torch.zeros(1), whole), stock(torch.zeros(1), whole))
