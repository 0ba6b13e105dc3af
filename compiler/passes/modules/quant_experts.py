"""The pass that brings quantised experts into the form that their device multiplies. Knows no checkpoints; a CPU takes them as loaded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.model.experts import weight_names
from pagegraph.compiler.quantization.layouts import RepackedExperts, takes_experts
from pagegraph.compiler.quantization.linear import QuantExperts
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.reference import in_eights
from pagegraph.kernels.moe.tiles import MAX_GEMV_TOKENS

log = logging.getLogger("pagegraph.quantization")


@torch.no_grad()
def quant_experts(model: nn.Module, round_activations: bool = True, device_type: str | None = None) -> int:
    """Bring quantised experts of `model` into the form of a GPU, their bias too; returns how many modules of experts there were.

    round_activations: in steps of more than a few tokens a GPU may quantise activations to 8 bits, in front of e4m3 with one scale a row
    and no bias.
    device_type: where its weights will be, if not where they are.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(held := getattr(module, "down_proj", None)) is QuantExperts
        and (device_type or held.qweight.device.type) != "cpu"
    ]
    unquantised, quantizing = 0, 0
    for layer in layers:
        form: Form = layer.experts_form
        names = weight_names(form)
        taken = takes_experts(*(getattr(layer, name).quantized for name in names), form.gated)
        rounds = round_activations and not layer.has_bias
        unquantised += not taken
        for name in names:
            gated = form.gated and name == names[0]
            if taken:
                setattr(layer, name, RepackedExperts(getattr(layer, name), gated, form.interleaved, rounds))
            else:
                values = getattr(layer, name).dequantized()
                delattr(layer, name)
                values = values.transpose(1, 2).contiguous() if form.transposed else values
                layer.register_parameter(name, nn.Parameter(values, requires_grad=False))
            return_freed_memory()
        quantizing += taken and all(getattr(layer, name).quantize_x for name in names)
        if taken and form.gated and layer.has_bias:
            bias = in_eights(getattr(layer, f"{names[0]}_bias"), form.interleaved)
            setattr(layer, f"{names[0]}_bias", nn.Parameter(bias, requires_grad=False))
    if unquantised:
        log.warning(
            "quantization: no product of this device takes quantised experts of %d of %d layers; they are held unquantised, as fast"
            " and as large as without",
            unquantised,
            len(layers),
        )
    if quantizing:
        log.info(
            "quantization: on Hopper GPUs steps of more than %d tokens may round activations to 8 bits in front of experts of %d of %d layers; "
            "round_activations=false keeps them as they are, at less speed",
            MAX_GEMV_TOKENS,
            quantizing,
            len(layers),
        )
    return len(layers)
