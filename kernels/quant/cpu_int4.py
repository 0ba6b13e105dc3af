"""One row times packed 4-bit values on a CPU with AVX-512, in C++ (`cpu_int4.cpp`): up to a fifth faster than PyTorch's.

Two linears with a norm between them, or four, are one call too. Where it is not built, or does not take a linear,
`kernels.quant.cpu` has PyTorch's. Knows only how PyTorch packs for AVX-512.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pagegraph.kernels import cpp_extension
from pagegraph.kernels.linear import reference

SOURCE = Path(__file__).with_suffix(".cpp")
LINEAR = ["uint8_t*", "uint16_t*", "uint16_t*"]
ARGUMENTS = ["uint16_t*"] * 2 + (LINEAR + LINEAR + ["uint16_t*"]) * 2 + ["uint16_t*"] + ["int64_t"] * 15 + ["float"] * 2

_kernel: Callable | None = None


def build() -> None:
    """From here on `takes` may say yes. CPUs without AVX-512 pack otherwise."""
    global _kernel
    if torch.cpu._is_avx512_supported():
        _kernel = cpp_extension.built(SOURCE, ARGUMENTS, "int4 GEMVs stay PyTorch's, which take longer")


def built_as() -> str:
    """What tells linears compiled with it from others."""
    return "" if _kernel is None else SOURCE.stem


def takes(dtype: torch.dtype, rows: int) -> bool:
    """Whether `linear_into` and `layer_into` are there for an x [rows, K] of `dtype`."""
    return _kernel is not None and rows == 1 and dtype == torch.bfloat16


def linear_into(x: Tensor, packed: Tensor, pairs: Tensor, *, group: int, out: Tensor) -> Tensor:
    """`pagegraph::int4_packed_linear` of one contiguous bfloat16 row [1, K] into out [1, N]."""
    if _kernel is None:  # compiled by a process in which it was
        return out.copy_(torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs))
    _kernel(x, x, packed, pairs, *[x] * 12, out, 1, 0, 0, x.shape[1], out.shape[1], group, *[0] * 9, 0.0, 0.0)
    return out


def layer(
    x: Tensor, residual: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], eps: Sequence[float]
) -> Tensor:
    """`pagegraph::int4_packed_layer`, by PyTorch's calls: x [1, K], residual [1, H] -> [1, H + N], residual and result.

    Every second product takes the norm of the residual plus the product before; that sum is the residual from there on.
    tensors: packed, pairs and bias of each product, of every second its norm behind them. numbers: how many products; bits of
    those with a bias (others have any tensor in its place), of those whose result is gated; inputs, outputs, group of each.
    """
    count, biased, gated, *sizes = numbers
    rest = iter(tensors)
    for index in range(count):
        packed, pairs, bias = next(rest), next(rest), next(rest)
        if index % 2:
            residual, x = reference.add_rms_norm(residual, x, next(rest), eps[index // 2])
        x = torch._weight_int4pack_mm_for_cpu(x, packed, sizes[3 * index + 2], pairs)
        x = x + bias if biased >> index & 1 else x
        x = reference.silu_mul(x) if gated >> index & 1 else x
    return torch.cat([residual, x], dim=1)


def layer_size(numbers: Sequence[int]) -> int:
    """H + N of `layer`."""
    count, _, gated, *sizes = numbers
    return sizes[1] + (sizes[3 * count - 2] >> (gated >> (count - 1)))


def layer_into(
    x: Tensor, residual: Tensor, *tensors: Tensor, numbers: Sequence[int], eps: Sequence[float], out: Tensor
) -> Tensor:
    """`layer` of contiguous bfloat16, all of it filled up to four products with anything."""
    if _kernel is None:
        return out.copy_(layer(x, residual, tensors, numbers, eps))
    _kernel(x, residual, *tensors, out, *numbers, *eps)
    return out
