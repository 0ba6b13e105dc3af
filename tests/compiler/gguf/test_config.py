"""What a GGUF file says of its model is what the converted model computes; what is not applied is refused by name."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagegraph.compiler.gguf.config import configuration
from pagegraph.compiler.gguf.file import GgufError, open_gguf
from pagegraph.compiler.model.source import resolve_model
from pagegraph.compiler.resolve import eos_ids, resolve_max_model_len
from tests.compiler.gguf.files import model_keys, model_tensors, spm_keys, stock_model, write, write_model


def converted(path: Path) -> nn.Module:
    folder = resolve_model(str(path), cache_dir=path.parent / "cache")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, model.config.vocab_size, (1, 150), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits


def rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **parameters))


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LAYERED = dict(
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
)
LENGTHS = {"attention.key_length": 24, "attention.value_length": 24}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model, its options, keys that say them
    "llama": ("llama", {}, {"rope.dimension_count": 16, "rope.freq_base": 10000.0}),
    "no base": ("llama", rope("default"), {}),
    "head size": ("llama", dict(head_dim=24), {**LENGTHS, "rope.dimension_count": 24}),
    "linear": ("llama", rope("linear", factor=4.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True}),
    "linear of old files": ("llama", rope("linear", factor=4.0), {"rope.scale_linear": 4.0}),
    "no scaling": ("llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "yarn": ("llama", YARN, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
    "yarn of qwen": ("qwen2", YARN, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True), {}),
    "qwen3": ("qwen3", dict(head_dim=24), {**LENGTHS, "rope.freq_base": 10000.0}),
    "experts": (
        "qwen3_moe",
        dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
        {"attention.key_length": 16, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "stablelm": ("stablelm", dict(layer_norm_eps=1e-3), {"rope.dimension_count": 4, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", rope("default", theta=999.0), {"rope.freq_base": 999.0}),
    "phi3": ("phi3", dict(sliding_window=9), {"attention.sliding_window": 9, "rope.dimension_count": 16, "rope.scaling.original_context_length": 256}),
    "nemotron": ("nemotron", dict(norm_eps=1e-3), {"rope.dimension_count": 8}),
    "gpt2": ("gpt2", dict(n_embd=64, n_layer=3, n_head=4, n_positions=256), {"attention.head_count_kv": None, "feed_forward_length": 256}),
    "gemma2": (
        "gemma2",
        dict(head_dim=24, sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        {**LENGTHS, "attention.sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        dict(head_dim=24, sliding_window=9, query_pre_attn_scalar=24, rope_parameters=LAYERED, sliding_window_pattern=2),
        {**LENGTHS, "attention.sliding_window": 9, "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6,
         "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "layers by flags": (
        "gemma3_text",
        dict(head_dim=24, sliding_window=9, query_pre_attn_scalar=24, layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        {**LENGTHS, "attention.sliding_window": 9, "attention.sliding_window_pattern": [False, True, True], "rope.freq_base": 1e6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_one_that_was_written(case: str, tmp_path: Path) -> None:
    kind, options, keys = CASES[case]
    stock = stock_model(kind, **options)
    got = logits(converted(write_model(tmp_path / "a.gguf", stock, keys)))
    torch.testing.assert_close(got, logits(stock), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "keys, longest",
    [
        ({}, 256),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 1024),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}, 256),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}, 512),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, 1024),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}, 256),
    ],
)
def test_the_length_to_serve_is_the_files(keys: dict[str, Any], longest: int, tmp_path: Path) -> None:
    """Scaling is within context_length already; what it reaches beyond is there for who asks."""
    folder = resolve_model(str(write_model(tmp_path / "a.gguf", stock_model("llama"), keys)), cache_dir=tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert resolve_max_model_len(None, config) == 256
    assert resolve_max_model_len(longest, config) == longest
    with pytest.raises(ValueError, match=f"limit of {longest} "):
        resolve_max_model_len(longest + 1, config)


def test_factors_of_llama_3(tmp_path: Path) -> None:
    stock = stock_model("llama", **LLAMA3)
    plain, _ = ROPE_INIT_FUNCTIONS["linear"](stock_model("llama", **rope("linear", factor=1.0)).config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](stock.config)
    factors = (plain / scaled).numpy()
    assert factors.min() == 1 and factors.max() > 7
    path = write_model(tmp_path / "a.gguf", stock, {"rope.dimension_count": 16}, tensors={"rope_freqs.weight": factors})
    torch.testing.assert_close(logits(converted(path)), logits(stock), atol=2e-5, rtol=1e-5)


def test_a_head_scaled_by_what_states_divide_into(tmp_path: Path) -> None:
    """The largest of two generations, told by its layers, takes another scale than its head size."""
    for layers, scalar in [(46, 32), (45, 24)]:
        stock = stock_model("gemma2", head_dim=24, hidden_size=64, num_attention_heads=2, num_hidden_layers=layers)
        path = write_model(tmp_path / f"{layers}.gguf", stock, {**LENGTHS})
        assert converted(path).config.query_pre_attn_scalar == scalar


def test_some_biases_are_zero(tmp_path: Path) -> None:
    stock = stock_model("llama", attention_bias=True)
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    tensors = {
        name: tensor for name, tensor in model_tensors(stock, "llama").items() if not name.endswith("attn_output.bias")
    }
    path = write(tmp_path / "a.gguf", "llama", {**model_keys(stock.config, "llama"), **spm_keys()}, tensors)
    torch.testing.assert_close(logits(converted(path)), logits(stock), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "key, value",
    [
        ("expert_count", 8), ("attention.scale", 0.1), ("attention.causal", False), ("residual_scale", 0.5), ("attention.clamp_kqv", 3.0),
        ("attention.value_length", 12), ("attention.head_count_kv", [2, 2, 1]), ("attention.head_count_kv", [2, 2]), ("attention.head_count", [4, 4, 2]),
        ("no.such.key", 1), ("attention.sliding_window", 9),
        ("rope.scaling.type", "longrope"), ("rope.scaling.type", "new"), ("rope.scaling.attn_factor", 1.5), ("rope.freq_base_swa", 5.0),
        ("rope.scaling.yarn_log_multiplier", 0.1), ("attention.sliding_window_pattern", 2),
    ],
)  # fmt: skip
def test_what_is_not_applied_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", stock_model("llama"), {key: value})
    with pytest.raises(GgufError, match=rf"a\.gguf: llama\.{key} = .*safetensors checkpoint"):
        resolve_model(str(path), cache_dir=tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("expert_count", 0), ("attention.causal", True), ("logit_scale", 1.0), ("attention.temperature_scale", 0.0), ("expert_shared_count", 0),
        ("expert_shared_feed_forward_length", 0), ("expert_group_count", 0), ("expert_group_used_count", 0), ("leading_dense_block_count", 0),
        ("nextn_predict_layers", 0), ("attention.head_count", [4, 4, 4]), ("attention.head_count_kv", [2, 2, 2]),
        ("feed_forward_length", [96, 96, 96]), ("attention.sliding_window", [0, 0, 0]),
    ],
)  # fmt: skip
def test_what_says_nothing_is_served(key: str, value: Any, tmp_path: Path) -> None:
    stock = stock_model("llama")
    got = logits(converted(write_model(tmp_path / "a.gguf", stock, {key: value})))
    torch.testing.assert_close(got, logits(stock), atol=2e-5, rtol=1e-5)


def test_tensors_that_become_no_weight_are_refused(tmp_path: Path) -> None:
    stock, extra = stock_model("qwen2"), np.ones(64, np.float32)
    path = write_model(
        tmp_path / "a.gguf", stock, tensors={"blk.1.attn_q_norm.weight": extra, "blk.0.attn_output.bias": extra}
    )
    with pytest.raises(
        GgufError,
        match=r"Qwen2ForCausalLM has no weights for the tensors blk\.0\.attn_output\.bias, blk\.1\.attn_q_norm\.weight",
    ):
        resolve_model(str(path), cache_dir=tmp_path)
    path = write_model(tmp_path / "b.gguf", stock, tensors={"blk.0.attn_output.bias": 0 * extra})
    torch.testing.assert_close(logits(converted(path)), logits(stock), atol=2e-5, rtol=1e-5)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", stock_model("llama"), {"block_count": 4})
    with pytest.raises(GgufError, match=r"not in the file: model\.layers\.3\..*9 weights"):
        resolve_model(str(path), cache_dir=tmp_path)


def test_rows_beyond_the_last_token(tmp_path: Path) -> None:
    stock = stock_model("llama", vocab_size=400)
    got = converted(write_model(tmp_path / "a.gguf", stock, {"vocab_size": 296}))
    assert got.config.vocab_size == 400
    torch.testing.assert_close(logits(got), logits(stock), atol=2e-5, rtol=1e-5)


def test_shapes_that_the_metadata_denies_are_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", stock_model("llama"), {"feed_forward_length": 100})
    with pytest.raises(
        GgufError, match=r"gate_proj\.weight has shape \[96, 64\], the model that the metadata describes \[100, 64\]"
    ):
        resolve_model(str(path), cache_dir=tmp_path)


def test_angles_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    """LlamaConfig has no place for heads that rotate in part."""
    path = write_model(tmp_path / "a.gguf", stock_model("llama", head_dim=24), {**LENGTHS, "rope.dimension_count": 12})
    with pytest.raises(GgufError, match=r"rotate by other angles than rope\.\* of the file"):
        resolve_model(str(path), cache_dir=tmp_path)


def test_longrope_of_phi3(tmp_path: Path) -> None:
    stock = stock_model("phi3")
    short, long = np.linspace(1, 2, 8), np.linspace(1, 40, 8)
    keys = {
        "rope.dimension_count": 16,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": math.sqrt(1.5),
    }
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    config = configuration(open_gguf(write_model(tmp_path / "a.gguf", stock, keys, tensors=tensors)))
    found = config.rope_parameters
    assert found["rope_type"] == "longrope" and found["original_max_position_embeddings"] == 64
    assert found["attention_factor"] == pytest.approx(math.sqrt(1.5))
    assert np.allclose(found["short_factor"], short) and np.allclose(found["long_factor"], long)
    path = write_model(tmp_path / "b.gguf", stock, keys, tensors={"rope_factors_long.weight": long})
    with pytest.raises(GgufError, match="which belong together"):
        configuration(open_gguf(path))


def test_text_ends_at_either_end(tmp_path: Path) -> None:
    """The end of a sequence and that of a turn, all the way to what the engine stops at."""
    folder = resolve_model(
        str(write_model(tmp_path / "a.gguf", stock_model("llama"), tokenizer__ggml__eot_token_id=270)),
        cache_dir=tmp_path,
    )
    assert eos_ids(folder, AutoConfig.from_pretrained(folder)) == {2, 270}


def test_recommended_sampling_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"general__sampling__temp": 0.25, "general__sampling__top_k": 20, "general__sampling__mirostat": 1}
    with caplog.at_level(logging.INFO):
        folder = resolve_model(
            str(write_model(tmp_path / "a.gguf", stock_model("llama"), **changes)), cache_dir=tmp_path
        )
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": [2], "do_sample": True, "temperature": 0.25, "top_k": 20
    }  # fmt: skip
    assert "general.sampling.mirostat" in caplog.text


def test_keys_outside_the_architecture_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody knows in one line; what says where a file comes from is for debugging."""
    unknown = {"general__attention_trick": 1, "clip__vision__block_count": 2, "maker__note": "x"}
    described = {
        "general__license__name": "mit",
        "general__base_model__0__name": "base",
        "quantize__imatrix__file": "x",
    }
    with caplog.at_level(logging.DEBUG, logger="pagegraph.gguf"):
        resolve_model(
            str(write_model(tmp_path / "a.gguf", stock_model("llama"), **unknown, **described)), cache_dir=tmp_path
        )
    lines = [(one.levelno, one.getMessage()) for one in caplog.records if "not applied" in one.getMessage()]
    assert lines == [
        (
            logging.INFO,
            "a.gguf: keys that are not known here and not applied: clip.vision.block_count, general.attention_trick, maker.note",
        ),
        (
            logging.DEBUG,
            "a.gguf: descriptive keys, not applied: general.base_model.0.name, general.license.name, quantize.imatrix.file",
        ),
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(general__type="adapter"), "is a LoRA adapter"),
        (dict(general__type="mmproj"), "of type 'mmproj'"),
        (dict(split__count=3), r"one of 3 parts .* gguf-split --merge"),
    ],
)
def test_files_that_are_no_whole_model_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", stock_model("llama"), **changes)
    with pytest.raises(GgufError, match=message):
        resolve_model(str(path), cache_dir=tmp_path)


@pytest.mark.parametrize("kept", [3, 40, 700, 9000, -7])
def test_files_that_are_cut_short_are_named(kept: int, tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", stock_model("llama"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(GgufError, match=r"a\.gguf is no (whole )?GGUF file: .*download it again"):
        resolve_model(str(path), cache_dir=tmp_path)


def test_a_pointer_of_git_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(GgufError, match="pointer of Git LFS.*git lfs pull"):
        resolve_model(str(path), cache_dir=tmp_path)
