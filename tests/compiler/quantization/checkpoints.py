"""Writes checkpoints in the formats of other programs: each tensor packed element by element, as its format is described.

Rounding is plain round-to-nearest. Every writer also returns the values that the format holds: code by code, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of a run of eight that each half byte of a word holds, lowest first


def grid(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weight [N, K] -> unsigned codes [N, K], zeros [N, K / group] and float16 scales [N, K / group]."""
    groups = weight.reshape(len(weight), -1, group)
    top = 2**bits - 1
    if symmetric:
        scale = np.abs(groups).max(-1) / (top // 2)
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scale = (high - low) / top
        zero = np.clip(np.round(-low / np.maximum(scale, 1e-8)), 0, top).astype(np.int64)
    scale = np.maximum(scale, 1e-6).astype(np.float16)
    codes = np.clip(np.round(groups / scale[..., None].astype(np.float32)) + zero[..., None], 0, top)
    return codes.astype(np.int64).reshape(weight.shape), zero, scale


def values(codes: np.ndarray, zero: np.ndarray, scale: np.ndarray, group: np.ndarray) -> torch.Tensor:
    """(code - zero) * scale, column k by the scale of group[k]."""
    return torch.from_numpy((codes - zero[:, group]).astype(np.float32) * scale[:, group].astype(np.float32))


def words(integers: np.ndarray, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """[..., n] unsigned integers -> int32 [..., n * bits / 32]; part i of a word holds element order[i] of its run."""
    a_word = 32 // bits
    packed = np.zeros((*integers.shape[:-1], integers.shape[-1] // a_word), np.uint32)
    for word in range(packed.shape[-1]):
        for part in range(a_word):
            element = integers[..., word * a_word + (order[part] if order else part)]
            packed[..., word] |= element.astype(np.uint32) << np.uint32(part * bits)
    return torch.from_numpy(packed.view(np.int32))


def awq(weight: np.ndarray, group: int) -> tuple[Tensors, torch.Tensor]:
    codes, zero, scale = grid(weight, 4, group, symmetric=False)
    tensors = dict(
        qweight=words(codes.T, 4, AWQ_ORDER),
        qzeros=words(zero.T, 4, AWQ_ORDER),
        scales=torch.from_numpy(scale.T.copy()),
    )
    return tensors, values(codes, zero, scale, np.arange(weight.shape[1]) // group)


def gptq(
    weight: np.ndarray, group: int, bits: int = 4, symmetric: bool = True, desc_act: bool = False, less: int = 1
) -> tuple[Tensors, torch.Tensor]:
    """With desc_act, groups are of inputs in a random order, the same for every linear of as many inputs."""
    size = weight.shape[1]
    order = np.random.default_rng(size).permutation(size) if desc_act else np.arange(size)
    codes, zero, scale = grid(weight[:, order], bits, group, symmetric)
    group_of = np.empty(size, np.int64)
    group_of[order] = np.arange(size) // group
    codes = codes[:, np.argsort(order)]
    stored = (zero - less) % 2**bits
    tensors = dict(
        qweight=words(codes, bits).T.contiguous(),
        qzeros=words(stored.T, bits),
        scales=torch.from_numpy(scale.T.copy()),
        g_idx=torch.from_numpy(group_of.astype(np.int32)),
    )
    return tensors, values(codes, zero, scale, group_of)


def pack_quantized(
    weight: np.ndarray, group: int, bits: int = 4, symmetric: bool = True
) -> tuple[Tensors, torch.Tensor]:
    codes, zero, scale = grid(weight, bits, group, symmetric)
    tensors = dict(
        weight_packed=words(codes, bits), weight_scale=torch.from_numpy(scale), weight_shape=torch.tensor(weight.shape)
    )
    if not symmetric:
        filled = np.concatenate([zero, np.zeros((-len(zero) % (32 // bits), zero.shape[1]), np.int64)])
        tensors["weight_zero_point"] = words(filled.T, bits).T.contiguous()
    return tensors, values(codes, zero, scale, np.arange(weight.shape[1]) // group)


def int8_rows(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    scale = torch.from_numpy(np.abs(weight).max(1, keepdims=True) / 127).bfloat16()
    codes = (torch.from_numpy(weight) / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return dict(weight=codes, weight_scale=scale), codes.float() * scale.float()


def fp8(weight: np.ndarray, per: str, scale_name: str = "weight_scale") -> tuple[Tensors, torch.Tensor]:
    """`per` is tensor, row or block (128 x 128)."""
    whole = torch.from_numpy(weight)
    if per == "tensor":
        scale = whole.abs().max() / 448
        spread = scale.expand_as(whole)
    elif per == "row":
        scale = whole.abs().amax(1, keepdim=True) / 448
        spread = scale.expand_as(whole)
    else:
        rows, columns = (-(-size // 128) for size in whole.shape)
        scale = torch.empty(rows, columns)
        spread = torch.empty_like(whole)
        for row in range(rows):
            for column in range(columns):
                at = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                scale[row, column] = whole[at].abs().max() / 448
                spread[at] = scale[row, column]
    codes = (whole / spread).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, scale_name: scale}
    if per == "tensor":
        tensors["input_scale"] = torch.tensor(0.01)
    return tensors, codes.float() * spread


def compressed(layout: str, **weights: object) -> dict[str, object]:
    return dict(
        quant_method="compressed-tensors",
        format=layout,
        config_groups=dict(group_0=dict(targets=["Linear"], weights=weights)),
        ignore=["lm_head"],
    )


Writer = Callable[[np.ndarray], tuple[Tensors, torch.Tensor]]

# name -> its quantization_config, and what becomes of a weight
FORMATS: dict[str, tuple[dict[str, object], Writer]] = {
    "awq_g32": (dict(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True), lambda w: awq(w, 32)),
    "awq_g64": (dict(quant_method="awq", bits=4, group_size=64, version="GEMM", zero_point=True), lambda w: awq(w, 64)),
    "awq_g128": (dict(quant_method="awq", bits=4, group_size=128, version="gemm", zero_point=True), lambda w: awq(w, 128)),
    "gptq_4": (dict(quant_method="gptq", bits=4, group_size=64, desc_act=False, sym=True), lambda w: gptq(w, 64)),
    "gptq_4_asymmetric": (
        dict(quant_method="gptq", bits=4, group_size=64, desc_act=False, sym=False), lambda w: gptq(w, 64, symmetric=False)),
    "gptq_4_act_order": (
        dict(quant_method="gptq", bits=4, group_size=64, desc_act=True, sym=True), lambda w: gptq(w, 64, desc_act=True)),
    "gptq_8": (dict(quant_method="gptq", bits=8, group_size=64, desc_act=False, sym=True), lambda w: gptq(w, 64, bits=8)),
    "gptq_8_act_order_asymmetric": (
        dict(quant_method="gptq", bits=8, group_size=32, desc_act=True, sym=False),
        lambda w: gptq(w, 32, bits=8, symmetric=False, desc_act=True)),
    "gptq_one_group": (
        dict(quant_method="gptq", bits=4, group_size=-1, desc_act=False, sym=True), lambda w: gptq(w, w.shape[1])),
    "gptq_v2": (
        dict(quant_method="gptq", bits=4, group_size=64, desc_act=False, sym=False, checkpoint_format="gptq_v2"),
        lambda w: gptq(w, 64, symmetric=False, less=0)),
    "w4a16": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=64, symmetric=True),
        lambda w: pack_quantized(w, 64)),
    "w4a16_asymmetric": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        lambda w: pack_quantized(w, 32, symmetric=False)),
    "w8a16": (
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        lambda w: pack_quantized(w, w.shape[1], bits=8)),
    "w8a8": (compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), int8_rows),
    "fp8_tensor": (
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True), lambda w: fp8(w, "tensor")),
    "fp8_row": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True), lambda w: fp8(w, "row")),
    "fp8_block": (
        dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128]),
        lambda w: fp8(w, "block", "weight_scale_inv")),
    "fp8_static": (dict(quant_method="fp8", activation_scheme="static"), lambda w: fp8(w, "tensor")),
}  # fmt: skip


def write(folder: Path, model: nn.Module, name: str) -> nn.Module:
    """Save `model` with every linear but the head in the named format; its weights become the values that the format holds."""
    config, writer = FORMATS[name]
    head = model.get_output_embeddings()
    tensors = dict(model.state_dict())
    for tied in getattr(model, "all_tied_weights_keys", None) or ():
        tensors.pop(tied)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            packed, dequantised = writer(module.weight.detach().float().numpy())
            del tensors[f"{path}.weight"]
            tensors.update({f"{path}.{leaf}": tensor.contiguous() for leaf, tensor in packed.items()})
            module.weight.data.copy_(dequantised)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.clone() for key, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": config}))
    return model
