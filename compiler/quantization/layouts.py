"""Quantised weights in the layout that their device multiplies fastest: `RepackedLinear` and `RepackedExperts` on CUDA, two forms on a CPU.

Knows what each device's GEMMs take; knows no checkpoints and no models.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pagegraph.compiler.quantization.linear import QuantExperts, QuantLinear, QuantModule
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.moe.reference import in_eights
from pagegraph.kernels.quant import cpu, reference
from pagegraph.kernels.quant.tiles import takes_8bit_activations
from pagegraph.kernels.quant.weight import QuantWeight

CPU_INT4_GROUPS = (32, 64, 128, 256)
CPU_INT4_ROWS = 16  # PyTorch packs as many rows of 4-bit values together
REPACKED_AT_ONCE = 1 << 28  # weights of experts: their copies on the way are a few bytes each
SUMS_AT_ONCE = 4  # in one loop: with one, adding up is slower than memory


class Int8Dynamic(nn.Module):
    """CPUs with 8-bit dot products: each token's activations become two int8 values (int8x2) by their own scale, and integers are multiplied.

    One would lose the small activations of a token that has one large one; the second rides along in the same reading
    of the weight. In plain operations, so that the compiler joins the rounding to the norm before it and the scales to what
    follows. One row is a sum over the dequantised weight, which the compiler writes a loop for (as `one_row_linears`).
    """

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.qweight, persistent=False)
        self.register_buffer("scale", linear.scale[:, 0].contiguous(), persistent=False)
        self.bias, self.out_features = linear.bias, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if torch.compiler.is_dynamo_compiling() and len(rows) == 1:  # `is_compiling` is true of other threads too
            row = torch.ops.pagegraph.in_memory(rows[0].float())
            parts = self.qweight.unflatten(0, (math.gcd(self.out_features, SUMS_AT_ONCE), -1)).unbind()
            product = (torch.cat([(part.float() * row).sum(-1) for part in parts]) * self.scale)[None]
        else:
            high, low, scale = reference.int8x2(rows)
            upper, lower = torch._int_mm(torch.cat([high, low]), self.qweight.t()).float().split(len(rows))
            product = (upper + lower / reference.INT8X2_STEPS) * scale * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


class RepackedLinear(QuantModule):
    """CUDA: the weight in the tensor cores' layout. quantize_x: in steps of many rows x may be quantised to 8 bits."""

    def __init__(self, linear: QuantLinear, quantize_x: bool = True) -> None:
        weight = repacked(linear.quantized, linear.dtype)
        super().__init__(weight)
        self.quantize_x = quantize_x
        self.may_quantize_x = quantize_x and takes_8bit_activations(weight, linear.in_features, linear.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.pagegraph.repacked_linear(
            self.ordered(x),
            self.qweight,
            self.scale,
            self.zero,
            self.bias,
            self.group,
            self.out_features,
            self.quantize_x,
        )


class RepackedExperts(QuantModule):
    """CUDA: the weights of a layer's experts in the tensor cores' layout; `kernels.moe.quant_stack` has the shapes.

    gated: rows are of gate and up, interleaved or one half each, and get the order that `pagegraph::repacked_experts` takes.
    quantize_x: in steps of more than a few tokens x may be quantised to 8 bits; kept where the weights are such that it may be.
    """

    def __init__(self, experts: QuantExperts, gated: bool, interleaved: bool, quantize_x: bool = True) -> None:
        weight, self.in_features = experts.quantized, experts.quantized.in_size
        count, rows = weight.qweight.shape[:2]
        step = count if weight.qweight.is_meta else max(1, REPACKED_AT_ONCE // (rows * self.in_features))
        parts = []
        for first in range(0, count, step):
            some = weight.map(lambda one, first=first: _whole_blocks(one[first : first + step], gated, interleaved))
            tall = repacked(some.map(lambda one: one.flatten(0, 1)), experts.dtype)
            parts.append(tall.map(lambda one, some=some: one.unflatten(0, (len(some.qweight), -1))))
        qweight, scale, zero = (
            None if one is None else torch.cat([part[at] for part in parts]) for at, one in enumerate(parts[0][:3])
        )
        assert qweight is not None and scale is not None
        super().__init__(QuantWeight(qweight, scale, zero, None, parts[0].group, rows))
        stack = QuantStack(qweight, scale, zero, self.group, rows, self.in_features)
        self.quantize_x = quantize_x and experts.dtype.itemsize == 2 and stack.has_e4m3_rows


def takes_experts(up: QuantWeight, down: QuantWeight, gated: bool) -> bool:
    """Whether `pagegraph::repacked_experts` multiplies both weights [E, N, K] of a layer."""
    whole = not gated or up.qweight.shape[1] % 16 == 0  # eights of gate and of up
    return whole and repacked_group(up) > 0 and repacked_group(down) > 0


def _whole_blocks(rows: torch.Tensor, gated: bool, interleaved: bool) -> torch.Tensor:
    """[E, N, ..], rows of gate and up in the order of the op, filled up to blocks with zeros."""
    rows = in_eights(rows, interleaved) if gated else rows
    as_bytes = rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
    return nn.functional.pad(as_bytes, (0, 0, 0, -rows.shape[1] % reference.REPACK_BLOCK)).view(rows.dtype)


def repacked(weight: QuantWeight, dtype: torch.dtype) -> QuantWeight:
    """A loaded weight in the tensor cores' layout, for x in `dtype`; `repacked_group` says of which."""
    size, group = weight.in_size, repacked_group(weight)
    scale, zero = (_regrouped(one, weight.group, group, size) for one in (weight.scale, weight.zero))
    if weight.kind == "fp8":
        return weight._replace(qweight=reference.exchanged_columns(weight.qweight), scale=scale, zero=zero, group=group)
    integers = reference.unpack_nibbles(weight.qweight) if weight.bits == 4 else weight.qweight
    if (
        group < size and weight.kind != "mxfp4"
    ):  # scales of small groups are read with the values: two bytes of each tell apart what few bits can
        scale, zero = (None if one is None else one.to(dtype) for one in (scale, zero))
    scale, zero = (None if one is None else reference.repack_scales(one, group, size) for one in (scale, zero))
    return weight._replace(qweight=reference.repack(integers, weight.bits), scale=scale, zero=zero, group=group)


def repacked_group(weight: QuantWeight) -> int:
    """Columns to a scale of `repacked`: those of the weight, or what divides them so that blocks have whole groups; 0: none."""
    if weight.group >= weight.in_size or weight.group % reference.REPACK_BLOCK == 0:
        return min(weight.group, weight.in_size)
    smallest = {"int4": 32, "mxfp4": 32, "int8": 16, "fp8": reference.REPACK_BLOCK}[weight.kind]
    common = math.gcd(weight.group, reference.REPACK_BLOCK)
    return common if common >= smallest else 0


def _regrouped(values: torch.Tensor | None, group: int, held: int, size: int) -> torch.Tensor | None:
    """Scales of groups as scales of parts of them."""
    if values is None or held >= size:
        return values
    return values.repeat_interleave(group // held, dim=1)[:, : -(-size // held)].contiguous()


class Int4Packed(nn.Module):
    """4-bit values as PyTorch packs them for this CPU, scales and zeros beside each other in the type of x.

    fixed: a row's bits do not depend on the others.
    """

    fixed = False

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        qweight = reference.unpack_nibbles(linear.qweight).int() + 8
        zero = torch.zeros_like(linear.scale) if linear.zero is None else linear.zero
        packed = torch._convert_weight_to_int4pack_for_cpu(qweight, 1)
        self.register_buffer("packed", packed, persistent=False)
        pairs = torch.stack([linear.scale.t(), zero.t()], dim=2).to(linear.dtype).contiguous()
        self.register_buffer("pairs", pairs, persistent=False)  # [K / group, N, 2]
        self.register_buffer("g_idx_order", linear.g_idx_order, persistent=False)
        self.group, self.bias, self.out_features = linear.group, linear.bias, linear.out_features
        # How values are packed is PyTorch's affair and differs between CPUs: where it is not as known here, many rows go as few do.
        known = self.out_features % cpu.INT4_BLOCK == 0
        self.unpacks = known and (packed.is_meta or torch.equal(cpu.unpack_int4(packed).int(), qweight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.g_idx_order is not None:
            x = x.index_select(-1, self.g_idx_order)
        rows = x.flatten(0, -2)
        if self.fixed:
            product = torch.ops.pagegraph.fixed_int4_linear(rows, self.packed, self.pairs, self.group)
        elif self.unpacks:
            product = torch.ops.pagegraph.int4_packed_linear(rows, self.packed, self.pairs, self.group)
        else:
            product = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.pairs)
        if self.bias is not None:
            product = product + self.bias
        return product.unflatten(0, x.shape[:-1])
