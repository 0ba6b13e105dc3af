"""GGUF's block types unpacked to qweight, scales and zeros, and linears and experts that keep them when a file is converted.

The blocks are those of ggml (`ggml-common.h`, docs of GGUF). Names and the order of rows are transformers' business: it is
asked to convert the file once for each of the three, as if it were the weights. Knows bytes; knows no devices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import nn

from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.kernels.quant import reference

log = logging.getLogger("pagegraph.quantization")

WIDE = {"F32", "F16", "BF16"}  # types of what is not quantised
QWEIGHT, SCALE, ZERO = range(3)


class UnpackedBlocks(NamedTuple):
    """Of blocks uint8 [B, bytes]: qweight float32 [B, size], scale float32 [B, groups], zero likewise or None."""

    qweight: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(bytes_: np.ndarray, run: int) -> np.ndarray:
    """[B, n] -> [B, 2 n]: of every `run` bytes first all low halves, then all high ones; float32, less 8."""
    runs = bytes_.reshape(len(bytes_), -1, run)
    return np.stack([runs & 15, runs >> 4], axis=2).reshape(len(bytes_), -1).astype(np.float32) - 8


def _q4_0(blocks: np.ndarray) -> UnpackedBlocks:
    return UnpackedBlocks(_nibbles(blocks[:, 2:], 16), _half(blocks, 0), None)


def _q4_1(blocks: np.ndarray) -> UnpackedBlocks:
    scale = _half(blocks, 0)
    return UnpackedBlocks(_nibbles(blocks[:, 4:], 16), scale, 8 * scale + _half(blocks, 2))


def _q8_0(blocks: np.ndarray) -> UnpackedBlocks:
    return UnpackedBlocks(blocks[:, 2:].copy().view(np.int8).astype(np.float32), _half(blocks, 0), None)


def _q4_k(blocks: np.ndarray) -> UnpackedBlocks:
    """256 values in eight groups; their 6-bit scales and minima take 12 bytes, the upper bits of the last four apart."""
    packed = blocks[:, 4:16].astype(np.int32)
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    scale = _half(blocks, 0) * scales
    return UnpackedBlocks(_nibbles(blocks[:, 16:], 32), scale, 8 * scale - _half(blocks, 2) * minima)


def _q6_k(blocks: np.ndarray) -> UnpackedBlocks:
    """256 values in sixteen groups: four low bits of each, then two high ones, in halves of 128."""
    low = _nibbles(blocks[:, :128], 64) + 8
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    qweight = low + 16.0 * high.reshape(len(blocks), 256) - 32
    return UnpackedBlocks(qweight, _half(blocks, 208) * blocks[:, 192:208].copy().view(np.int8), None)


BLOCKS: dict[GGMLQuantizationType, Callable[[np.ndarray], UnpackedBlocks]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}


def unpack_blocks(data: np.ndarray, kind: GGMLQuantizationType) -> UnpackedBlocks:
    """Of a tensor's bytes uint8 [.., bytes a row]: qweight [.., K], scale and zero [.., groups]."""
    found = BLOCKS[kind](np.ascontiguousarray(data).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]))
    rows = data.shape[:-1]
    return UnpackedBlocks(*(None if part is None else part.reshape(*rows, -1).astype(np.float32) for part in found))


def keep(path: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put qweight, scale and zero of every linear of a type in BLOCKS in the place of its weight, and the rest in bfloat16.

    Likewise of the experts, if all of them are of such types.

    `tensors` are the converted, dequantised weights of `path` by the names of `model`. Returns the `quantization_config`.
    Raises QuantizationError where no linear is of such a type.
    """
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
    experts = _keeps_experts(path)
    others = ", ".join(sorted(types - WIDE - {kind.name for kind in BLOCKS}))
    linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    stacked = {name for name, parameter in model.named_parameters() if parameter.dim() == 3} if experts else set()
    qweights, scales, zeros = (_converted(path, model, part, experts) for part in (QWEIGHT, SCALE, ZERO))
    for name in list(tensors):
        kept = name in linears - tied or name in stacked
        if not kept or scales[name].shape == tensors[name].shape:
            tensors[name] = tensors[name].bfloat16()
            continue
        stem, weight = f"{name}." if name in stacked else name.removesuffix("weight"), tensors.pop(name)
        unpacked, scale, zero = qweights[name].to(torch.int8), scales[name], zeros[name]
        four_bits = (
            int(unpacked.min()) >= -8
            and int(unpacked.max()) < 8
            and weight.shape[-1] // scale.shape[-1] % reference.NIBBLE_SPAN == 0
        )
        tensors[f"{stem}qweight"] = reference.pack_nibbles(unpacked) if four_bits else unpacked
        tensors[f"{stem}scale"] = scale
        if zero.any():
            tensors[f"{stem}zero"] = zero
    if not any(name.endswith(".qweight") for name in tensors):
        raise QuantizationError(
            f"{path}: quantization=gguf keeps {', '.join(kind.name for kind in BLOCKS)}, and no linear of the file is one of these ({others or 'nothing is quantised'}); "
            "leave quantization out, or take a file of those types"
        )
    if others:
        log.warning("quantization=gguf: %s holds weights as %s too, which become bfloat16", path.name, others)
    return {"quant_method": "gguf"}


def _keeps_experts(path: Path) -> bool:
    """Whether all stacked experts are of types in BLOCKS, gate and up of a layer of the same: they become one weight."""
    kinds = {one.name: one.tensor_type for one in gguf.GGUFReader(path).tensors if len(one.shape) == 3}
    alike = all(kind == kinds.get(name.replace("ffn_gate", "ffn_up"), kind) for name, kind in kinds.items())
    return alike and kinds.keys() != set() and all(kind in BLOCKS for kind in kinds.values())


def _converted(path: Path, model: nn.Module, part: int, experts: bool) -> dict[str, torch.Tensor]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with _parts_for_weights(part, experts):
        return load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]


@contextmanager
def _parts_for_weights(part: int, experts: bool) -> Iterator[None]:
    dequantize = gguf.dequantize

    def of_part(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        if kind not in BLOCKS or data.ndim not in ((2, 3) if experts else (2,)):
            return dequantize(data, kind)
        found = unpack_blocks(data, kind)
        one = found[part]
        return np.zeros_like(found.scale) if one is None else one

    gguf.dequantize = of_part
    try:
        yield
    finally:
        gguf.dequantize = dequantize
