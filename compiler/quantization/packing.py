"""How quantised checkpoints name, pack, group and centre their tensors: data, and one reader for all of them.

Every format becomes the same `Quantized`: weight [N, K] = qweight * scale + zero of the column's group. Knows tensors by name
and the words of `quantization_config`; knows no modules, files or devices.

The layouts are those that AutoAWQ (GEMM), AutoGPTQ, compressed-tensors, transformers' fine-grained FP8 and ggml write.

int4 made while loading has groups of 128 columns on a GPU where inputs divide so, of 32 on a CPU: scale and zero of
32 columns are a fifth of the bytes. Checkpoints keep the groups they have. The output head keeps 8 bits under int4
and is left alone under fp8; routers of experts are never quantised. A linear becomes a quantised one the moment its
tensors are read, so no model is held whole in bfloat16. Siblings merge by stacking rows, since scales belong to rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pagegraph.compiler.quantization.methods import METHODS, ONLINE
from pagegraph.kernels.quant import reference

# Columns that share a scale in int4 made while loading: of those that divide, the first. A GPU needs steps of 128 columns to be
# fast; a CPU's product is as fast with groups of 32, which are more exact.
ONLINE_GROUPS = {"cuda": (128, 64, 32), "cpu": (32,)}
ROWS_AT_ONCE = 2048  # of a weight that is quantised: what it takes in float32 meanwhile stays small
WORD_BITS = 32


class QuantizationError(ValueError):
    """A quantisation that is not served, or that the checkpoint contradicts; the message names both and what works."""


@dataclass(slots=True)
class Quantized:
    """weight [N, K] = qweight * scale + zero; column k of it meets input g_idx_order[k] where `g_idx_order` is set.

    qweight: int8 or float8_e4m3fn [N, K], or uint8 [N, K / 2] as `reference.pack_nibbles` packs 4 bits. scale, zero: float32
    [N, ceil(K / group)], None where every zero is 0. g_idx_order: int64 [K].
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int
    g_idx_order: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of what is set."""
        named = dict(qweight=self.qweight, scale=self.scale, zero=self.zero, g_idx_order=self.g_idx_order)
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class Words:
    """Integers packed into 32-bit words, lowest bits first: of which tensor, along which axis, in which order."""

    qweight: str
    scale: str
    zero_points: str
    qweight_axis: int
    zero_points_axis: int
    inputs_first: bool  # tensors are [K, N] and not [N, K]
    order: tuple[int, ...] = ()  # the place in a word's run of each of its parts; empty: as they come
    zero_points_less: int = 0  # what was subtracted from a zero point before it was stored
    g_idx: str = ""  # tensor with the group of each input
    ignored: tuple[str, ...] = ()


PACKED: dict[str, Words] = {
    "awq": Words("qweight", "scales", "qzeros", 1, 1, True, order=(0, 2, 4, 6, 1, 3, 5, 7)),
    "gptq": Words("qweight", "scales", "qzeros", 0, 1, True, zero_points_less=1, g_idx="g_idx"),
    "gptq_v2": Words("qweight", "scales", "qzeros", 0, 1, True, g_idx="g_idx"),
    "pack-quantized": Words(
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        1,
        0,
        False,
        g_idx="weight_g_idx",
        ignored=("weight_shape",),
    ),
}
# A weight of 8 bits an element beside its scale; the first scale that is there holds. Scales of activations are not
# needed: ours are taken from each token.
ELEMENTS_SCALES = ("weight_scale", "weight_scale_inv")
ELEMENTS_IGNORED = (
    "input_scale",
    "activation_scale",
    "output_scale",
    "weight_zero_point",
    "input_zero_point",
    "output_zero_point",
)
# Older quantisers left no `quantization_config` but a file of their own with the same words -> its quant_method.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
STORED = "stored"  # our own form, as a converted GGUF file holds it


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a checkpoint's `quantization_config` says: method, layout, bits of a code. Groups show in the shapes."""

    method: str
    layout: str  # a key of PACKED, "elements" or STORED
    bits: int
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    fp8: bool = False  # codes are float8_e4m3fn
    act_order: bool = False  # groups are of inputs in an order of their own, which a tensor tells

    def marks(self) -> tuple[str, ...]:
        """Tensors of which any tells a quantised linear from one left as it was."""
        if self.layout in PACKED:
            return (PACKED[self.layout].qweight,)
        return ("qweight",) if self.layout == STORED else ELEMENTS_SCALES

    def tensors(self) -> tuple[str, ...]:
        """Every tensor that may stand beside a quantised linear's bias."""
        if self.layout == STORED:
            return ("qweight", "scale", "zero")
        if self.layout == "elements":
            return ("weight", *ELEMENTS_SCALES, *ELEMENTS_IGNORED)
        words = PACKED[self.layout]
        return tuple(filter(None, (words.qweight, words.scale, words.zero_points, words.g_idx, *words.ignored)))

    def read(self, tensors: Mapping[str, torch.Tensor], where: str) -> Quantized:
        """The linear `where` from its tensors by last name; raises QuantizationError for what does not fit together."""
        if self.layout == STORED:
            qweight, scale = tensors["qweight"], tensors["scale"]
            size = qweight.shape[1] * (2 if qweight.dtype == torch.uint8 else 1)
            return Quantized(qweight, scale.float(), _float(tensors.get("zero")), size // scale.shape[1])
        if self.layout == "elements":
            return _read_elements(tensors, self.block, where)
        return _read_words(PACKED[self.layout], tensors, self.bits, where, self.act_order)


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
    if method == "gguf":
        return Scheme("gguf", STORED, 8)
    if method == "compressed-tensors":
        return _compressed(config)
    raise QuantizationError(
        f"quantization_config: quant_method {method!r} is not known; known: awq, gptq, fp8, compressed-tensors, and GGUF files"
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


def unpack_words(words: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """int32 words -> the unsigned integers of `bits` in them, int32, `axis` longer by the integers a word holds."""
    parts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    spread = words.unsqueeze(axis + 1) >> parts.view(-1, *[1] * (words.dim() - axis - 1))
    if order:
        spread = spread.index_select(axis + 1, torch.tensor(order, device=words.device).argsort())
    return (spread & ((1 << bits) - 1)).flatten(axis, axis + 1)


def _read_words(words: Words, tensors: Mapping[str, torch.Tensor], bits: int, where: str, act_order: bool) -> Quantized:
    """qweight, zero_points unsigned; w = (qweight - zero_point) * scale, with the zero point in the middle where none is stored."""
    middle = 1 << (bits - 1)
    qweight = unpack_words(_two_axes(tensors, words.qweight, where, torch.int32), bits, words.qweight_axis, words.order)
    scale = _two_axes(tensors, words.scale, where, one_will_do=not words.inputs_first).float()
    zero_points = tensors.get(words.zero_points)
    if zero_points is not None and zero_points.dtype == torch.int8 and zero_points.numel() == scale.numel():
        zero_points = (
            zero_points.reshape(scale.shape).int() + middle
        )  # signed and one by one, as compressed-tensors leaves those it does not pack
    elif zero_points is not None:
        zero_points = unpack_words(
            _two_axes(tensors, words.zero_points, where, torch.int32), bits, words.zero_points_axis, words.order
        )
        # A zero point of 0 is stored as the largest integer where one was subtracted.
        zero_points = (zero_points + words.zero_points_less) & ((1 << bits) - 1)
    if words.inputs_first:
        qweight, scale, zero_points = qweight.t(), scale.t(), None if zero_points is None else zero_points.t()
    shape, filled = (
        tensors.get("weight_shape"),
        WORD_BITS // bits,
    )  # what fills the last words up is fewer than a word holds
    fits = shape is None or 0 <= qweight.shape[1] - int(shape[1]) < filled
    qweight = qweight if shape is None else qweight[:, : int(shape[1])]
    rows, size = qweight.shape
    scale, zero_points = (
        one if one is None or one.numel() > 1 else one.expand(rows, 1) for one in (scale, zero_points)
    )
    groups = scale.shape[1]
    if (
        not fits
        or len(scale) != rows
        or zero_points is not None
        and not (zero_points.shape[1] == groups and rows <= len(zero_points) < rows + filled)
    ):
        stored = ", ".join(
            f"{name} {list(tensors[name].shape)}"
            for name in (words.qweight, words.scale, words.zero_points)
            if name in tensors
        )
        raise QuantizationError(
            f"{where}: {stored} do not belong together in {bits} bits; is quantization_config that of this checkpoint?"
        )
    if size % groups:
        raise QuantizationError(
            f"{where}: {size} inputs do not divide into {groups} groups; quantise with a group that divides them"
        )
    group = size // groups
    g_idx_order = _g_idx_order(tensors.get(words.g_idx), size, group, where, act_order)
    if g_idx_order is not None:
        qweight = qweight[:, g_idx_order]
    zero = None
    if zero_points is not None:
        zero_points = zero_points[: len(qweight)]
        zero = (middle - zero_points).float() * scale if bool((zero_points != middle).any()) else None
    return Quantized(_stored(qweight - middle, bits, group, where), scale.contiguous(), zero, group, g_idx_order)


def _two_axes(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    where: str,
    dtype: torch.dtype | None = None,
    one_will_do: bool = False,
) -> torch.Tensor:
    """The named tensor of two axes, of that type; with `one_will_do` one value, or one a row, is brought to two."""
    if (tensor := tensors.get(name)) is None:
        raise QuantizationError(f"{where}: the checkpoint has no {where}.{name}")
    if one_will_do and tensor.dim() < 2:
        tensor = tensor.reshape(-1, 1)
    if tensor.dim() != 2 or dtype is not None and tensor.dtype != dtype:
        found, wanted = (str(one or "").removeprefix("torch.") for one in (tensor.dtype, dtype))
        raise QuantizationError(
            f"{where}.{name} is {found} {list(tensor.shape)}; {f'{wanted} and ' * bool(wanted)}two axes are served"
        )
    return tensor


def _g_idx_order(
    groups: torch.Tensor | None, size: int, group: int, where: str, act_order: bool
) -> torch.Tensor | None:
    """The order of inputs in which groups are neighbours; None where they are already.

    groups: int [size], the group of each input. Some quantisers write all of them as 0 or below where inputs keep their order.
    """
    if groups is not None and len(groups) != size:
        raise QuantizationError(
            f"{where}: groups of {len(groups)} inputs, codes of {size}; is `bits` in quantization_config right?"
        )
    in_order = group == size if groups is None else torch.equal(groups.long(), torch.arange(size) // group)
    if in_order:
        return None
    if groups is None or bool((groups <= 0).all()):
        if act_order:
            found = (
                "there are no group indices (g_idx)"
                if groups is None
                else "its group indices are all 0, which tells none"
            )
            raise QuantizationError(
                f"{where}: quantization_config says that inputs are in an order of their own (desc_act or actorder), but {found}; "
                "take a checkpoint that is whole, or one quantised without"
            )
        return None
    g_idx_order = groups.argsort(stable=True)
    if not torch.equal(groups[g_idx_order].long(), torch.arange(len(groups)) // group):
        raise QuantizationError(
            f"{where}: g_idx puts other than {group} inputs into a group; quantise with groups of equal size"
        )
    return g_idx_order


def _stored(qweight: torch.Tensor, bits: int, group: int, where: str) -> torch.Tensor:
    qweight = qweight.to(torch.int8)
    if bits == 8:
        return qweight.contiguous()
    if group % reference.NIBBLE_SPAN:
        raise QuantizationError(
            f"{where}: {qweight.shape[1]} inputs in groups of {group}; 4-bit groups have to be multiples of {reference.NIBBLE_SPAN}"
        )
    return reference.pack_nibbles(qweight)


def _read_elements(tensors: Mapping[str, torch.Tensor], block: tuple[int, int] | None, where: str) -> Quantized:
    weight = tensors["weight"]
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise QuantizationError(f"{where}: weights of {weight.dtype} are not served; int8 and float8_e4m3fn are")
    scale = next((tensors[name] for name in ELEMENTS_SCALES if name in tensors), None)
    if scale is None:
        raise QuantizationError(f"{where}: no {' or '.join(ELEMENTS_SCALES)} beside the weight")
    rows, size = weight.shape
    scale, group = scale.float(), size
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    elif scale.dim() == 2 and block is not None:
        if scale.shape != (-(-rows // block[0]), -(-size // block[1])):
            raise QuantizationError(
                f"{where}: scales {list(scale.shape)} are not those of blocks of {block[0]} x {block[1]}"
            )
        scale, group = scale.repeat_interleave(block[0], dim=0)[:rows], block[1]
    elif scale.numel() == rows:
        scale = scale.reshape(rows, 1)
    else:
        raise QuantizationError(f"{where}: scales {list(scale.shape)} are neither one nor one a row of {rows}")
    return Quantized(weight.contiguous(), scale.contiguous(), None, group)


def quantize(weight: torch.Tensor, method: str, where: str) -> Quantized:
    """weight [N, K] by one of ONLINE: fp8 and int8 a scale a row, int4 a scale and a zero a group."""
    parts = weight.split(ROWS_AT_ONCE)
    if method != "int4":
        dtype = torch.int8 if method == "int8" else torch.float8_e4m3fn
        qweight, scale = map(torch.cat, zip(*(reference.quantize_rows(part, dtype) for part in parts)))
        return Quantized(qweight, scale, None, weight.shape[1])
    group = online_group(weight.shape[1], weight.device.type, where)
    groups = (reference.quantize_groups(part, group) for part in parts)
    qweight, scale, zero = map(torch.cat, zip(*((reference.pack_nibbles(qweight), *rest) for qweight, *rest in groups)))
    return Quantized(qweight, scale, zero, group)


def online_group(inputs: int, device: str, where: str) -> int:
    """Columns of a group of int4 that is made on such a device."""
    group = next((group for group in ONLINE_GROUPS.get(device, ONLINE_GROUPS["cpu"]) if inputs % group == 0), None)
    if group is None:
        raise QuantizationError(
            f"{where}: {inputs} inputs do not divide into groups of {ONLINE_GROUPS['cpu'][-1]}; set quantization to int8 or fp8"
        )
    return group


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()
