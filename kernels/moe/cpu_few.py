"""Few rows by quantised weights of experts on a CPU, in C++ (`cpu_few.cpp`): weights are not written out dequantised.

Where it is not built, `kernels.moe.cpu` dequantises blocks. Knows weights as they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pagegraph.kernels import cpp_extension
from pagegraph.kernels.quant.reference import NIBBLE_SPAN
from pagegraph.kernels.quant.weight import Kind, QuantWeight

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = ["float*", "int64_t*", "uint8_t*", "uint8_t*", "float*", "float*", "float*"] + ["int64_t"] * 7
KINDS: tuple[Kind, ...] = ("int8", "fp8", "int4", "mxfp4")  # by their numbers there
MOST_ROWS: dict[Kind, int] = {
    "int8": 1,
    "fp8": 2,
    "int4": 8,
    "mxfp4": 8,
}  # of an expert in the mean: each unpacks the weight again

_kernel: Callable | None = None


def build() -> None:
    """From here on `takes` may say yes."""
    global _kernel
    _kernel = cpp_extension.built(
        SOURCE, ARGUMENTS, "quantised experts of few tokens are dequantised, which takes longer"
    )


def takes(rows: int, parts: int, weight: QuantWeight) -> bool:
    """Whether `products` is there for so many rows of so many experts."""
    whole = weight.bits == 8 or weight.group % NIBBLE_SPAN == 0 or weight.group >= weight.in_size
    return _kernel is not None and whole and 0 < rows <= MOST_ROWS[weight.kind] * parts


def products(rows: Tensor, parts: list[tuple[int, int, int]], weight: QuantWeight, out: Tensor) -> None:
    """Of rows [R, K] where a part (expert, first row, behind the last) has them, into out [R, N]; by the weight in float32."""
    assert _kernel is not None
    x, sums = rows.float().contiguous(), torch.empty(out.shape)
    qweight, scale, zero = (None if one is None else one.contiguous() for one in weight[:3])
    assert qweight is not None and scale is not None
    codes = qweight.view(torch.uint8)
    of_mxfp4 = weight.kind == "mxfp4"
    floats = x if of_mxfp4 else scale.float()
    zeros = floats if zero is None else zero.float()
    size = (len(parts), len(x), out.shape[1], x.shape[1], min(weight.group, x.shape[1]))
    _kernel(
        x, torch.tensor(parts), codes, scale if of_mxfp4 else codes, floats, zeros, sums,
        *size, KINDS.index(weight.kind), zero is not None,
    )  # fmt: skip
    for _, first, last in parts:
        out[first:last] = sums[first:last]
