"""One row times packed 4-bit codes on a CPU with AVX-512, in C++ (`cpu_int4.cpp`): up to a fifth faster than PyTorch's product.

Where it is not built, or does not take a product, `kernels.cpu` has PyTorch's. Knows only how PyTorch packs for AVX-512.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels import cpu_build

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = ["uint16_t*", "uint8_t*", "uint16_t*", "uint16_t*", "int64_t", "int64_t", "int64_t"]

_kernel: Callable | None = None


def build() -> None:
    """From here on `takes` may say yes. CPUs without AVX-512 pack otherwise."""
    global _kernel
    if torch.cpu._is_avx512_supported():
        _kernel = cpu_build.built(SOURCE, ARGUMENTS, "int4 products of one row stay PyTorch's, which take longer")


def built_as() -> str:
    """What tells products compiled with it from others."""
    return "" if _kernel is None else SOURCE.stem


def takes(dtype: torch.dtype, rows: int) -> bool:
    """Whether `linear_into` is there for an x [rows, K] of `dtype`."""
    return _kernel is not None and rows == 1 and dtype == torch.bfloat16


def linear_into(x: Tensor, packed: Tensor, pairs: Tensor, *, group: int, out: Tensor) -> Tensor:
    """`pagegraph::int4_packed_linear` of one contiguous bfloat16 row [1, K] into out [1, N]."""
    if _kernel is None:  # compiled by a process in which it was
        return out.copy_(torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs))
    _kernel(x, packed, pairs, out, out.shape[1], x.shape[1], group)
    return out
