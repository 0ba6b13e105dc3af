"""One row times packed 4-bit codes on a CPU with AVX-512, in C++ (`cpu_int4.cpp`): a fifth faster than PyTorch's packed product.

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


def takes(x: Tensor) -> bool:
    """Whether `linear` is there for this x [T, K]."""
    return _kernel is not None and len(x) == 1 and x.dtype == torch.bfloat16


def linear(x: Tensor, packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    """`pagegraph::int4_packed_linear` of one bfloat16 row."""
    out = x.new_empty(1, packed.shape[0])
    _kernel(x.contiguous(), packed, pairs, out, packed.shape[0], x.shape[1], group)
    return out
