"""Checkpoints of quantised mixtures, written from random models, each beside the values that it holds as a plain checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.compiler.model.every_type import tiny
from tests.compiler.quantization.checkpoints import FORMATS

# Groups of 64 divide both sides; blocks of 128 rows do not divide an expert's 192.
WIDE = dict(hidden_size=128, intermediate_size=192, moe_intermediate_size=192, num_hidden_layers=2, head_dim=32)
OF_KIND: dict[str, dict[str, Any]] = {"deepseek_v3": dict(qk_rope_head_dim=32, head_dim=32, first_k_dense_replace=1)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

Tensors = dict[str, torch.Tensor]


def config_of(kind: str) -> PretrainedConfig:
    config = tiny(kind)
    config.update({key: value for key, value in (WIDE | OF_KIND.get(kind, {})).items() if hasattr(config, key)})
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = config.layer_types[:2]
    return config


def write_mixture(folder: Path, kind: str, name: str) -> nn.Module:
    """A random model of `kind` whose experts and other linears are in the named format of FORMATS -> what it computes by."""
    quantization, writer = FORMATS[name]

    def quantised(tensors: Tensors) -> tuple[Tensors, Tensors]:
        packed, plain = {}, {}
        for key, tensor in tensors.items():
            path, _, leaf = key.rpartition(".")
            if not _is_linear(path) or leaf != "weight":
                packed[key] = plain[key] = tensor
                continue
            parts, values = writer(tensor.numpy())
            plain[key] = values.contiguous()
            packed |= {f"{path}.{ending}": part.contiguous() for ending, part in parts.items()}
        return packed, plain

    return _write(folder, kind, quantised, quantization)


def _is_linear(path: str) -> bool:
    leaf = path.rpartition(".")[2]
    return leaf not in ("lm_head", "gate", "router", "embed_tokens") and "norm" not in leaf


def write_mxfp4(folder: Path) -> nn.Module:
    """GPT-OSS as it is published: blocks and scales of random bits, everything else as it was."""
    generator = np.random.default_rng(0)

    def quantised(tensors: Tensors) -> tuple[Tensors, Tensors]:
        packed, plain = {}, {}
        for key, tensor in tensors.items():
            if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                packed[key] = plain[key] = tensor
                continue
            experts, columns, rows = tensor.shape
            blocks = generator.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
            scales = generator.integers(120, 124, (experts, rows, columns // 32), np.uint8)
            packed |= {f"{key}_blocks": torch.from_numpy(blocks), f"{key}_scales": torch.from_numpy(scales)}
            plain[key] = torch.from_numpy(mxfp4_values(blocks, scales)).transpose(1, 2).contiguous()
        return packed, plain

    return _write(folder, "gpt_oss", quantised, dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"]))


def mxfp4_values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """OCP MX: 32 values of e2m1 share a power of two; column 2 j is the low half of byte j. -> float32 [E, N, K]."""
    values = np.empty((*blocks.shape[:3], 32), np.float32)
    values[..., 0::2], values[..., 1::2] = E2M1[blocks & 15], E2M1[blocks >> 4]
    values *= np.exp2(scales.astype(np.float32) - 127)[..., None]
    return values.reshape(*blocks.shape[:2], -1)


def _write(
    folder: Path, kind: str, quantised: Callable[[Tensors], tuple[Tensors, Tensors]], quantization: dict[str, Any]
) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)
    model.save_pretrained(folder / "plain")
    file = folder / "plain" / "model.safetensors"
    packed, plain = quantised(load_file(file))
    save_file(plain, file, metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=quantization)))
    return AutoModelForCausalLM.from_pretrained(
        folder / "plain", dtype=torch.float32, attn_implementation="eager"
    ).eval()
