"""How quantised checkpoints name, pack, group and centre their tensors: data, and one reader for all of them.

Every format becomes the same `QuantWeight`, bit for bit what the format says. Knows tensors by name; knows no modules, files,
devices or configurations. The layouts are those that AutoAWQ (GEMM), AutoGPTQ, compressed-tensors, transformers'
fine-grained FP8, GPT-OSS (MXFP4) and ggml write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.weight import QuantWeight

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class PackedLayout:
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


PACKED: dict[str, PackedLayout] = {
    "awq": PackedLayout("qweight", "scales", "qzeros", 1, 1, True, order=(0, 2, 4, 6, 1, 3, 5, 7)),
    "gptq": PackedLayout("qweight", "scales", "qzeros", 0, 1, True, zero_points_less=1, g_idx="g_idx"),
    "gptq_v2": PackedLayout("qweight", "scales", "qzeros", 0, 1, True, g_idx="g_idx"),
    "pack-quantized": PackedLayout(
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
MXFP4 = "mxfp4"  # stacked experts in blocks of 32 columns: two values a byte, a power of two a block
MXFP4_BLOCK = 32
STORED = "stored"  # our own form, as a converted GGUF file holds it


def unpack_integers(packed: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Packed int32 -> the unsigned integers of `bits` in them, int32, `axis` longer by the integers a word holds."""
    parts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=packed.device)
    spread = packed.unsqueeze(axis + 1) >> parts.view(-1, *[1] * (packed.dim() - axis - 1))
    if order:
        spread = spread.index_select(axis + 1, torch.tensor(order, device=packed.device).argsort())
    return (spread & ((1 << bits) - 1)).flatten(axis, axis + 1)


def read_packed(
    layout: PackedLayout, tensors: Mapping[str, torch.Tensor], bits: int, where: str, act_order: bool
) -> QuantWeight:
    """qweight, zero_points unsigned; w = (qweight - zero_point) * scale, with the zero point in the middle where none is stored."""
    middle = 1 << (bits - 1)
    qweight = unpack_integers(
        _two_axes(tensors, layout.qweight, where, torch.int32), bits, layout.qweight_axis, layout.order
    )
    scale = _two_axes(tensors, layout.scale, where, one_will_do=not layout.inputs_first).float()
    zero_points = _zero_points(layout, tensors, bits, where, scale.shape)
    if layout.inputs_first:
        qweight, scale, zero_points = qweight.t(), scale.t(), None if zero_points is None else zero_points.t()
    shape = tensors.get("weight_shape")
    filled = WORD_BITS // bits  # what fills the last words up is fewer than a word holds
    fits = shape is None or 0 <= qweight.shape[1] - int(shape[1]) < filled
    qweight = qweight if shape is None else qweight[:, : int(shape[1])]
    rows, size = qweight.shape
    if scale.numel() == 1:
        scale = scale.expand(rows, 1)
    if zero_points is not None and zero_points.numel() == 1:
        zero_points = zero_points.expand(rows, 1)
    groups = scale.shape[1]
    if (
        not fits
        or len(scale) != rows
        or zero_points is not None
        and not (zero_points.shape[1] == groups and rows <= len(zero_points) < rows + filled)
    ):
        stored = ", ".join(
            f"{name} {list(tensors[name].shape)}"
            for name in (layout.qweight, layout.scale, layout.zero_points)
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
    g_idx_order = _g_idx_order(tensors.get(layout.g_idx), size, group, where, act_order)
    if g_idx_order is not None:
        qweight = qweight[:, g_idx_order]
    zero = None
    if zero_points is not None:
        zero_points = zero_points[: len(qweight)]
        zero = (middle - zero_points).float() * scale if bool((zero_points != middle).any()) else None
    stored = _stored(qweight - middle, bits, group, where)
    return QuantWeight(stored, scale.contiguous(), zero, None, group, rows, g_idx_order)


def _zero_points(
    layout: PackedLayout, tensors: Mapping[str, torch.Tensor], bits: int, where: str, scales: torch.Size
) -> torch.Tensor | None:
    """Zero points made unsigned, on the axes they are stored on, for scales of this shape; None where none are stored."""
    zero_points = tensors.get(layout.zero_points)
    if zero_points is None:
        return None
    if zero_points.dtype == torch.int8 and zero_points.numel() == scales.numel():
        # Signed and one by one, as compressed-tensors leaves those it does not pack.
        return zero_points.reshape(scales).int() + (1 << (bits - 1))
    zero_points = unpack_integers(
        _two_axes(tensors, layout.zero_points, where, torch.int32), bits, layout.zero_points_axis, layout.order
    )
    # A zero point of 0 is stored as the largest integer where one was subtracted.
    return (zero_points + layout.zero_points_less) & ((1 << bits) - 1)


def read_stored(tensors: Mapping[str, torch.Tensor]) -> QuantWeight:
    """A linear, or stacked experts, in our own form, as a converted GGUF file holds it."""
    qweight, scale, zero = tensors["qweight"], tensors["scale"].float(), tensors.get("zero")
    weight = QuantWeight(qweight, scale, None if zero is None else zero.float(), None, 0, qweight.shape[-2])
    return weight._replace(group=weight.in_size // scale.shape[-1])


def read_mxfp4(tensors: Mapping[str, torch.Tensor], where: str) -> QuantWeight:
    """blocks uint8 [E, N, K / 32, 16], the even column in the low half of a byte; scales uint8 [E, N, K / 32], powers of two."""
    blocks, scales = tensors.get("blocks"), tensors.get("scales")
    if blocks is None or scales is None:
        raise QuantizationError(f"{where}: MXFP4 needs {where}_blocks and {where}_scales beside each other")
    fits = blocks.dim() == 4 and blocks.shape[3] == MXFP4_BLOCK // 2 and blocks.shape[:3] == scales.shape
    if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
        shapes = ", ".join(f"{one.dtype} {list(one.shape)}".removeprefix("torch.") for one in (blocks, scales))
        raise QuantizationError(
            f"{where}: {shapes} are no blocks and scales of MXFP4; uint8 [E, N, G, 16] and [E, N, G] are"
        )
    qweight = torch.empty(
        *blocks.shape[:2], blocks.shape[2] * MXFP4_BLOCK // 2, dtype=torch.uint8, device=blocks.device
    )
    for expert, packed in enumerate(blocks):  # one at a time: unpacked it is twice as large
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        qweight[expert] = reference.pack_codes(codes)
    return QuantWeight(qweight, scales, None, None, MXFP4_BLOCK, blocks.shape[1])


def read_elements(tensors: Mapping[str, torch.Tensor], block: tuple[int, int] | None, where: str) -> QuantWeight:
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
    return QuantWeight(weight.contiguous(), scale.contiguous(), None, None, group, rows)


def _g_idx_order(
    groups: torch.Tensor | None, size: int, group: int, where: str, act_order: bool
) -> torch.Tensor | None:
    """The order of inputs in which groups are neighbours; None where they are already.

    groups: int [size], the group of each input. Some quantisers write all of them as 0 or below where inputs keep their order.
    """
    if groups is not None and len(groups) != size:
        raise QuantizationError(
            f"{where}: groups of {len(groups)} inputs, a weight of {size}; is `bits` in quantization_config right?"
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
