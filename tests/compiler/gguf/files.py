"""GGUF files written from small models of transformers, with the names, layouts and keys of llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

UNKNOWN, CONTROL, USER_DEFINED, BYTE, NORMAL = 2, 3, 4, 6, 1
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
}  # where transformers has another name
PIECES = [
    "\u2581",
    *"abcdefghijklmnopqrstuvwxyz",
    "\u2581a",
    "he",
    "er",
    "in",
    "th",
    "\u2581th",
    "\u2581the",
    "an",
    "on",
]
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def spm_keys(pieces: list[str] = PIECES, scores: list[float] | None = None) -> dict[str, Any]:
    """Keys of a `llama` vocabulary: three control tokens, 256 bytes, and pieces whose scores fall from the first on."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = scores or [-float(place) for place in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + scores,
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def model_keys(config: Any, arch: str) -> dict[str, Any]:
    """Sizes of a configuration; further keys are each test's own."""
    epsilons = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": next(
            (value for name in epsilons if (value := getattr(config, name, None))), None
        ),
    }
    return {f"{arch}.{key}": value for key, value in keys.items()}


def model_tensors(model: nn.Module, arch: str) -> dict[str, np.ndarray]:
    """Weights of a model as the file holds them, by the file's names."""
    config, tied = model.config, set(model.all_tied_weights_keys)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name in tied:
            continue
        values, (stem, leaf) = weight.numpy(), name.rsplit(".", 1)
        if ".mlp.experts." in name:
            layer, parts = (
                stem.split(".")[2],
                dict(down=values) if leaf == "down_proj" else dict(zip(("gate", "up"), np.split(values, 2, axis=1))),
            )
            tensors |= {f"blk.{layer}.ffn_{part}_exps.weight": np.ascontiguousarray(one) for part, one in parts.items()}
            continue
        if arch == "llama" and (
            heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                stem.split(".")[-1]
            )
        ):
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if arch == "nemotron" and name.endswith("norm.weight"):
            values = values + 1
        if arch == "gpt2" and values.ndim == 2 and stem.split(".")[-1] in ("c_attn", "c_proj", "c_fc"):
            values = values.T
        tensors[f"{names.get_name(stem)}.{leaf}"] = np.ascontiguousarray(values)
    return tensors


def write(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file of float32 tensors; a key of None is left out."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stock_model(kind: str, **options: Any) -> nn.Module:
    """A random model of three layers whose vocabulary is that of `spm_keys`."""
    torch.manual_seed(0)
    vocabulary = len(spm_keys()["tokenizer.ggml.tokens"])
    config = AutoConfig.for_model(
        kind, **{**SIZES, "vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases that do something
    return model


def write_model(path: Path, model: nn.Module, own: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The file of a model.

    own: further keys of the architecture, without its name; changes: other keys (`.` as `__`) and tensors.
    """
    arch = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    keys = {
        **model_keys(model.config, arch),
        **spm_keys(),
        **{f"{arch}.{key}": value for key, value in (own or {}).items()},
    }
    tensors = {**model_tensors(model, arch), **changes.pop("tensors", {})}
    return write(path, arch, {**keys, **{key.replace("__", "."): value for key, value in changes.items()}}, tensors)
