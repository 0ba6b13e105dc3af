"""A checkpoint's `quantization_config`: which scheme it names, and what of the asked-for and the found is served.

Knows the words of configurations and the names of layouts; knows no tensors, files or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pagegraph.compiler.quantization.methods import METHODS, ONLINE, QuantizationError
from pagegraph.compiler.quantization.packing import (
    ELEMENTS_IGNORED,
    ELEMENTS_SCALES,
    MXFP4,
    PACKED,
    STORED,
    read_elements,
    read_mxfp4,
    read_packed,
    read_stored,
)
from pagegraph.kernels.quant.weight import QuantWeight

# Older quantisers left no `quantization_config` but a file of their own with the same words -> its quant_method.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a checkpoint's `quantization_config` says: method, layout, bits of a value. Groups show in the shapes."""

    method: str
    layout: str  # a key of PACKED, "elements", MXFP4 or STORED
    bits: int
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    fp8: bool = False  # values are float8_e4m3fn
    act_order: bool = False  # groups are of inputs in an order of their own, which a tensor tells

    def marks(self) -> tuple[str, ...]:
        """Endings of names, any of which tells a quantised weight from one left as it was."""
        if self.layout in PACKED:
            return (f".{PACKED[self.layout].qweight}",)
        if self.layout == MXFP4:
            return ("_blocks",)
        return (".qweight",) if self.layout == STORED else tuple(f".{name}" for name in ELEMENTS_SCALES)

    def tensors(self) -> tuple[str, ...]:
        """Endings of every tensor that may be of a quantised weight."""
        if self.layout == STORED:
            return (".qweight", ".scale", ".zero")
        if self.layout == MXFP4:
            return ("_blocks", "_scales")
        if self.layout == "elements":
            return tuple(f".{name}" for name in ("weight", *ELEMENTS_SCALES, *ELEMENTS_IGNORED))
        packed = PACKED[self.layout]
        names = (packed.qweight, packed.scale, packed.zero_points, packed.g_idx, *packed.ignored)
        return tuple(f".{name}" for name in names if name)

    def read(self, tensors: Mapping[str, torch.Tensor], where: str) -> QuantWeight:
        """The weight `where` from its tensors by last name; raises QuantizationError for what does not fit together."""
        if self.layout == STORED:
            return read_stored(tensors)
        if self.layout == MXFP4:
            return read_mxfp4(tensors, where)
        if self.layout == "elements":
            return read_elements(tensors, self.block, where)
        return read_packed(PACKED[self.layout], tensors, self.bits, where, self.act_order)


def detect(config: Mapping[str, Any] | None) -> Scheme | None:
    """The scheme of a checkpoint's `quantization_config`, None where there is none; QuantizationError for unknown ones."""
    if not config:
        return None
    method = config.get("quant_method")
    if method == "awq":
        if (version := str(config.get("version", "gemm")).lower()) != "gemm":
            raise QuantizationError(f"quantization_config: version {version!r} of AWQ is not served; gemm is")
        return Scheme("awq", "awq", _bits(config.get("bits", config.get("w_bit", 4)), (4,), "awq"))
    if method == "gptq":
        layout = "gptq_v2" if config.get("checkpoint_format") == "gptq_v2" else "gptq"
        return Scheme("gptq", layout, _bits(config.get("bits"), (4, 8), "gptq"), act_order=bool(config.get("desc_act")))
    if method == "fp8":
        block = config.get("weight_block_size")
        return Scheme("fp8", "elements", 8, block=tuple(block) if block else None, fp8=True)
    if method == "mxfp4":
        return Scheme("mxfp4", MXFP4, 4)
    if method == "gguf":
        return Scheme("gguf", STORED, 8)
    if method == "compressed-tensors":
        return _compressed(config)
    raise QuantizationError(
        f"quantization_config: quant_method {method!r} is not known; known: awq, gptq, fp8, mxfp4, compressed-tensors, and GGUF files"
    )


def resolve(asked: str | None, config: Mapping[str, Any] | None) -> Scheme | str | None:
    """What to do with a checkpoint: its own scheme, a method of ONLINE that was asked for, or None.

    Raises QuantizationError where the word and the checkpoint contradict each other.
    """
    scheme = detect(config)
    if asked is None or scheme is not None and asked == scheme.method:
        return scheme
    if asked not in METHODS:
        raise QuantizationError(f"quantization={asked} is not known; known: {', '.join(METHODS)}")
    if scheme is not None:
        raise QuantizationError(
            f"quantization={asked}, but the checkpoint is quantised by {scheme.method}; leave quantization out or set it to {scheme.method}"
        )
    if asked not in ONLINE:
        source = "comes from no .gguf file" if asked == "gguf" else "has no quantization_config"
        raise QuantizationError(
            f"quantization={asked}, but the checkpoint {source}; {', '.join(ONLINE)} quantise while loading, or leave quantization out"
        )
    return asked


def _compressed(config: Mapping[str, Any]) -> Scheme | None:
    """compressed-tensors: one group of linears, described by the numbers of its weights."""
    named = config.get("config_groups")
    if config.get("kv_cache_scheme") and not named:
        return None  # keys and values alone, which are held by a scale of 1
    if not isinstance(named, Mapping) or not all(isinstance(group, Mapping) for group in named.values()) or not named:
        raise QuantizationError(
            "quantization_config: config_groups has to name at least one group of linears with its weights"
        )
    groups = list(named.values())
    described = [group.get("weights") or {} for group in groups]
    if len({(w.get("num_bits"), w.get("type"), w.get("strategy"), w.get("group_size")) for w in described}) != 1:
        raise QuantizationError("quantization_config: config_groups hold several kinds of weights; one kind is served")
    weights, layout = described[0], groups[0].get("format") or config.get("format")
    if layout == "pack-quantized":
        bits = _bits(weights.get("num_bits"), (4, 8), "pack-quantized")
        order = str(weights.get("actorder")).lower() in ("true", "group", "dynamic")
        return Scheme("compressed-tensors", layout, bits, act_order=order)
    if layout in ("int-quantized", "float-quantized", "naive-quantized"):
        if weights.get("type") == "int" and not weights.get("symmetric", True):
            raise QuantizationError(
                f"quantization_config: {layout} weights with zero points are not served; symmetric ones are"
            )
        block = weights.get("block_structure")
        block = block.split("x") if isinstance(block, str) else block
        bits, fp8 = _bits(weights.get("num_bits"), (8,), layout), weights.get("type") == "float"
        return Scheme("compressed-tensors", "elements", bits, block=tuple(map(int, block)) if block else None, fp8=fp8)
    raise QuantizationError(
        f"quantization_config: format {layout!r} of compressed-tensors is not served; pack-quantized, int-quantized, "
        "float-quantized and naive-quantized are"
    )


def _bits(bits: Any, served: tuple[int, ...], method: str) -> int:
    if bits not in served:
        raise QuantizationError(
            f"quantization_config: {method} of {bits!r} bits is not served; {' and '.join(map(str, served))} are"
        )
    return bits
