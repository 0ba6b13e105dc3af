"""Quantised linears: the module that holds one, and the pass that brings each into the form its device multiplies fastest.

Knows what a device's products take and which of them beat the unquantised product; knows no checkpoints.

On a CPU int8 takes two int8 values (int8x2) of each activation in one reading of the weight: with one digit, activations with
large outliers (SmolLM2 has them) cost KL 0.066 against bfloat16, with two 0.010. int4 has three ways there: our GEMV
for one row of bfloat16 with AVX-512, PyTorch's packed linear for few rows, and from 128 rows on the weight is
dequantised first, which needs to know how PyTorch packs. That is checked on each weight; where it differs, all rows
go as few do.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.quantization.packing import Quantized
from pagegraph.kernels.quant import cpu, reference
from pagegraph.kernels.quant.tiles import KINDS, MEMORY_BOUND_ROWS, takes_8bit_activations

log = logging.getLogger("pagegraph.quantization")

CPU_INT4_GROUPS = (32, 64, 128, 256)
CPU_INT4_ROWS = 16  # PyTorch packs as many rows of 4-bit codes together
SUMS_AT_ONCE = 4  # in one loop: with one, adding up is slower than memory


class QuantLinear(nn.Module):
    """states [..., K] -> [..., N] with the weight of a `Quantized`; `forward` is the op that serves every form."""

    def __init__(self, quantized: Quantized, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("qweight", "scale", "zero", "g_idx_order"):
            self.register_buffer(name, getattr(quantized, name), persistent=False)
        self.group = quantized.group
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
        self.dtype = dtype  # of states and results

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1] * 8 // self.bits

    @property
    def bits(self) -> int:
        return 4 if self.qweight.dtype == torch.uint8 else 8

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.g_idx_order is not None:
            states = states.index_select(-1, self.g_idx_order)
        return torch.ops.pagegraph.quant_linear(states, self.qweight, self.scale, self.zero, self.bias, self.group)

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] in `dtype`, columns in the order of the inputs."""
        weight = reference.dequantize(self.qweight, self.scale, self.zero, self.group)
        if self.g_idx_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.g_idx_order, weight)
        return weight.to(self.dtype)


class Int8Dynamic(nn.Module):
    """CPUs with 8-bit dot products: each token's states become two int8 values (int8x2) by their own scale, and integers are multiplied.

    One digit would lose the small states of a token that has one large state; the second rides along in the same reading
    of the weight. In plain operations, so that the compiler joins the rounding to the norm before it and the scales to what
    follows. One row is a sum over the widened weight, which the compiler writes a loop for (as `one_row_linears`).
    """

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.qweight, persistent=False)
        self.register_buffer("scale", linear.scale[:, 0].contiguous(), persistent=False)
        self.bias, self.out_features = linear.bias, linear.out_features

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.flatten(0, -2)
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
        return product.to(states.dtype).unflatten(0, states.shape[:-1])


class RepackedLinear(nn.Module):
    """CUDA: qweight, scales and zeros laid as the threads of a product want them. quantize_x: states may be rounded to 8 bits."""

    def __init__(self, linear: QuantLinear, quantize_x: bool = True) -> None:
        super().__init__()
        self.quantize_x = quantize_x
        size = linear.in_features
        self.group = repacked_group(linear)
        scale, zero = (_regrouped(one, linear.group, self.group, size) for one in (linear.scale, linear.zero))
        if linear.qweight.dtype == torch.float8_e4m3fn:
            qweight = reference.exchanged_columns(linear.qweight)
        else:
            qweight = reference.unpack_nibbles(linear.qweight) if linear.bits == 4 else linear.qweight
            qweight = reference.repack(qweight, linear.bits)
            if (
                self.group < size
            ):  # of small groups they are read with the codes: two bytes of each tell apart what few bits can
                scale, zero = (None if one is None else one.to(linear.dtype) for one in (scale, zero))
            scale, zero = (
                None if one is None else reference.repack_scales(one, self.group, size) for one in (scale, zero)
            )
        for name, values in dict(qweight=qweight, scale=scale, zero=zero, g_idx_order=linear.g_idx_order).items():
            self.register_buffer(name, values, persistent=False)
        self.bias, self.out_features = linear.bias, linear.out_features
        kind = KINDS[linear.qweight.dtype]
        self.may_quantize_x = quantize_x and takes_8bit_activations(
            kind, linear.dtype, self.out_features, size, self.group, zero is not None, qweight.device
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.g_idx_order is not None:
            states = states.index_select(-1, self.g_idx_order)
        return torch.ops.pagegraph.repacked_linear(
            states, self.qweight, self.scale, self.zero, self.bias, self.group, self.out_features, self.quantize_x
        )


def repacked_group(linear: QuantLinear) -> int:
    """Columns to a scale of `RepackedLinear`: those of the linear, or what divides them so that blocks have whole groups; 0 where nothing does."""
    if linear.group >= linear.in_features or linear.group % reference.REPACK_BLOCK == 0:
        return min(linear.group, linear.in_features)
    least = {torch.uint8: 32, torch.int8: 16, torch.float8_e4m3fn: reference.REPACK_BLOCK}[linear.qweight.dtype]
    common = math.gcd(linear.group, reference.REPACK_BLOCK)
    return common if common >= least else 0


def _regrouped(values: torch.Tensor | None, group: int, held: int, size: int) -> torch.Tensor | None:
    """Scales of groups as scales of parts of them."""
    if values is None or held >= size:
        return values
    return values.repeat_interleave(group // held, dim=1)[:, : -(-size // held)].contiguous()


class Int4Packed(nn.Module):
    """4-bit codes as PyTorch packs them for this CPU, scales and zeros beside each other in the type of the states."""

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
        # How codes lie is PyTorch's affair and differs between CPUs: where it is not as known here, many rows go as few do.
        self.unpacks = self.out_features % cpu.INT4_BLOCK == 0 and torch.equal(cpu.unpack_int4(packed).int(), qweight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.g_idx_order is not None:
            states = states.index_select(-1, self.g_idx_order)
        rows = states.flatten(0, -2)
        if self.unpacks:
            product = torch.ops.pagegraph.int4_packed_linear(rows, self.packed, self.pairs, self.group)
        else:
            product = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.pairs)
        if self.bias is not None:
            product = product + self.bias
        return product.unflatten(0, states.shape[:-1])


def stacked(linears: list[QuantLinear]) -> QuantLinear:
    """Linears of one input as one, rows below each other; `stackable` says of which."""
    first = linears[0]
    zero = None
    if any(linear.zero is not None for linear in linears):
        zero = torch.cat([torch.zeros_like(linear.scale) if linear.zero is None else linear.zero for linear in linears])
    quantized = Quantized(
        torch.cat([linear.qweight for linear in linears]),
        torch.cat([linear.scale for linear in linears]),
        zero,
        first.group,
        first.g_idx_order,
    )
    bias = None if first.bias is None else torch.cat([linear.bias for linear in linears])
    return QuantLinear(quantized, bias, first.dtype)


def stackable(linears: list[QuantLinear]) -> bool:
    """Whether every row keeps its codes and scales when the linears become one."""
    first = linears[0]
    alike = {
        (one.in_features, one.qweight.dtype, one.qweight.device, one.group, one.bias is None, one.dtype)
        for one in linears
    }
    if len(alike) != 1 or any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return False
    if first.g_idx_order is None:
        return all(linear.g_idx_order is None for linear in linears)
    return all(
        linear.g_idx_order is not None and torch.equal(linear.g_idx_order, first.g_idx_order) for linear in linears
    )


@torch.no_grad()
def quant_linears(model: nn.Module, round_activations: bool = True) -> int:
    """Bring every QuantLinear of `model` (weights loaded) into its device's form; returns how many there were.

    round_activations: in steps of many rows a GPU may round states to 8 bits, of weights of any format.
    """
    widened, quantizing = 0, 0
    # No QuantLinear is held here: each is to go when its form is there.
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is QuantLinear
    ]
    for parent, name in places:
        form = _form(getattr(parent, name), round_activations)
        setattr(parent, name, form)
        return_freed_memory()
        widened += type(form) is nn.Linear
        quantizing += type(form) is RepackedLinear and form.may_quantize_x
    if widened:
        log.warning(
            "quantization: no product of this device takes %d of %d quantised linears; they are held unquantised, "
            "as fast and as large as without",
            widened,
            len(places),
        )
    if quantizing:
        log.info(
            "quantization: steps of more than about %d tokens may round activations to 8 bits in front of %d of %d quantised linears; "
            "round_activations=false keeps them as they are, at less speed",
            MEMORY_BOUND_ROWS,
            quantizing,
            len(places),
        )
    return len(places)


def _form(linear: QuantLinear, quantize_x: bool) -> nn.Module:
    """On CUDA the op chooses by rows; on the CPU the product is chosen here, once."""
    if linear.qweight.device.type != "cpu":
        return RepackedLinear(linear, quantize_x) if repacked_group(linear) else _widened(linear)
    if (
        linear.qweight.dtype == torch.int8
        and linear.scale.shape[1] == 1
        and linear.zero is None
        and linear.g_idx_order is None
    ):
        if torch.cpu._is_vnni_supported():
            return Int8Dynamic(linear)
    elif (
        linear.qweight.dtype == torch.uint8
        and linear.group in CPU_INT4_GROUPS
        and linear.out_features % CPU_INT4_ROWS == 0
    ):
        return Int4Packed(linear)
    return _widened(linear)


def _widened(linear: QuantLinear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(linear.dequantized(), requires_grad=False)
    plain.bias = linear.bias
    return plain
