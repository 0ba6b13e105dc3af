"""Quantisation of an unquantised checkpoint while it loads, a linear at a time.

int4 has groups of 128 columns on a GPU where inputs divide so, of 32 on a CPU: scale and zero of 32 columns are a fifth of
the bytes. A linear becomes a quantised one the moment its weight is read, so no model is held whole in bfloat16. Knows
weights; knows no modules and no files.
"""

from __future__ import annotations

import torch

from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.weight import QuantWeight

# Columns that share a scale in int4 made while loading: of those that divide, the first. A GPU needs steps of 128 columns to be
# fast; a CPU's product is as fast with groups of 32, which are more exact.
ONLINE_GROUPS = {"cuda": (128, 64, 32), "cpu": (32,)}
ROWS_AT_ONCE = 2048  # of a weight that is quantised: what it takes in float32 meanwhile stays small


def quantize(weight: torch.Tensor, method: str, where: str, device_type: str | None = None) -> QuantWeight:
    """weight [N, K] by one of ONLINE: fp8 and int8 a scale a row, int4 a scale and a zero a group.

    device_type: where a weight without values will be.
    """
    parts = weight.split(ROWS_AT_ONCE)
    if method != "int4":
        dtype = torch.int8 if method == "int8" else torch.float8_e4m3fn
        qweight, scale = map(torch.cat, zip(*(reference.quantize_rows(part, dtype) for part in parts)))
        return QuantWeight(qweight, scale, None, None, weight.shape[1], len(weight))
    group = online_group(weight.shape[1], device_type or weight.device.type, where)
    groups = (reference.quantize_groups(part, group) for part in parts)
    qweight, scale, zero = map(torch.cat, zip(*((reference.pack_nibbles(qweight), *rest) for qweight, *rest in groups)))
    return QuantWeight(qweight, scale, zero, None, group, len(weight))


def online_group(inputs: int, device: str, where: str) -> int:
    """Columns of a group of int4 that is made on such a device."""
    group = next((group for group in ONLINE_GROUPS.get(device, ONLINE_GROUPS["cpu"]) if inputs % group == 0), None)
    if group is None:
        raise QuantizationError(
            f"{where}: {inputs} inputs do not divide into groups of {ONLINE_GROUPS['cpu'][-1]}; set quantization to int8 or fp8"
        )
    return group
