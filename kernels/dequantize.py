"""Triton: a weight of 8-bit codes and scales as a weight of 16 bits, read and written once: for products of many rows by cuBLAS.

Knows codes and groups as `kernels.ops` describes them; knows no products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.widen import scaled

BLOCK = 4096  # elements
BLOCK_K = 256  # most columns of a block, which lie in one group
NUM_WARPS = 4


@triton.jit
def dequantize_kernel(
    out_ptr,
    codes_ptr,
    scale_ptr,
    shift_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    n = n.to(tl.int64)
    begin = tl.program_id(1) * BLOCK_K
    column = begin + tl.arange(0, BLOCK_K)
    inside = in_n[:, None] & (column < K)[None, :]
    scale_at = n * GROUPS + begin // GROUP
    scale = tl.load(scale_ptr + scale_at, mask=in_n, other=0.0)
    shift = scale
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + scale_at, mask=in_n, other=0.0)
    codes = tl.load(codes_ptr + n[:, None] * K + column[None, :], mask=inside, other=0.0)
    out_at = out_ptr + n[:, None] * K + column[None, :]
    tl.store(out_at, scaled(codes.to(tl.float32), scale, shift, HAS_SHIFT).to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """The weight as in `kernels.ops`, all contiguous -> [N, K] in dtype; as `reference.dequantize`, rounded once."""
    out_size, groups = scale.shape
    size = codes.shape[1]
    out = torch.empty(out_size, size, dtype=dtype, device=codes.device)
    block_k = BLOCK_K if groups == 1 else min(BLOCK_K, group & -group)
    block_n = BLOCK // block_k
    dequantize_kernel[-(-out_size // block_n), -(-size // block_k)](
        out,
        codes,
        scale,
        scale if shift is None else shift,
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=groups,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        HAS_SHIFT=shift is not None,
        num_warps=NUM_WARPS,
    )
    return out
