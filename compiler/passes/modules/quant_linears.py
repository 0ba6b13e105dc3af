"""Quantised linears: the module that holds one, and the pass that brings each into the form its device multiplies fastest.

Knows what a device's products take and which of them beat the unquantised product; knows no checkpoints.

On a CPU int8 takes two int8 values (int8x2) of each activation in one reading of the weight: with one, activations with
large outliers (SmolLM2 has them) cost KL 0.066 against bfloat16, with two 0.010. int4 has three ways there: our GEMV
for one row of bfloat16 with AVX-512, PyTorch's packed linear for few rows, and from 128 rows on the weight is
dequantised first, which needs to know how PyTorch packs. That is checked on each weight; where it differs, all rows
go as few do.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.quantization.layouts import (
    CPU_INT4_GROUPS,
    CPU_INT4_ROWS,
    Int4Packed,
    Int8Dynamic,
    RepackedLinear,
    repacked_group,
)
from pagegraph.compiler.quantization.linear import QuantLinear, tell_dtype
from pagegraph.kernels.quant.tiles import MEMORY_BOUND_ROWS

log = logging.getLogger("pagegraph.quantization")


@torch.no_grad()
def quant_linears(model: nn.Module, round_activations: bool = True, device_type: str | None = None) -> int:
    """Bring every QuantLinear of `model` into its device's form; returns how many there were.

    round_activations: in steps of many rows a GPU may quantise activations to 8 bits, of weights of any format.
    device_type: where its weights will be, if not where they are.
    """
    dequantized, quantizing = 0, 0
    # No QuantLinear is held here: each is to go when its form is there.
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is QuantLinear
    ]
    for parent, name in places:
        dtype = getattr(parent, name).dtype
        form = _form(getattr(parent, name), round_activations, device_type)
        if type(form) is not nn.Linear:
            tell_dtype(form, dtype)
        setattr(parent, name, form)
        return_freed_memory()
        dequantized += type(form) is nn.Linear
        quantizing += type(form) is RepackedLinear and form.may_quantize_x
    if dequantized:
        log.warning(
            "quantization: no product of this device takes %d of %d quantised linears; they are held unquantised, "
            "as fast and as large as without",
            dequantized,
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


def _form(linear: QuantLinear, quantize_x: bool, device_type: str | None) -> nn.Module:
    """On CUDA the op chooses by rows; on the CPU the product is chosen here, once."""
    if (device_type or linear.qweight.device.type) != "cpu":
        return RepackedLinear(linear, quantize_x) if repacked_group(linear.quantized) else _dequantized(linear)
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
    return _dequantized(linear)


def _dequantized(linear: QuantLinear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(linear.dequantized(), requires_grad=False)
    plain.bias = linear.bias
    return plain
