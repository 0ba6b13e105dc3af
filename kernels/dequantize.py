"""Triton: a weight of codes and scales as a weight of 16 bits, read and written once: for products of many rows by cuBLAS.

Knows codes and groups as `kernels.ops` describes them; knows no products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import NIBBLE_SPAN

SPAN = tl.constexpr(NIBBLE_SPAN)
BLOCK_N = 16
BLOCK_K = 256
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
    INT4: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (n < N) & (k < K)
    if INT4:  # a byte holds two columns: neighbours in memory read it twice, the second time from the cache
        byte = k // SPAN * (SPAN // 2) + k % (SPAN // 2)
        packed = tl.load(codes_ptr + n * (K // 2) + byte, mask=inside, other=0)
        codes = ((packed >> (k % SPAN // (SPAN // 2) * 4)) & 15).to(tl.float32) - 8.0
    else:
        codes = tl.load(codes_ptr + n * K + k, mask=inside, other=0.0).to(tl.float32)
    at, has_scale = n, n < N  # one for a row of the tile, or one an element
    if GROUPS > 1:
        at, has_scale = n * GROUPS + k // GROUP, inside
    weight = codes * tl.load(scale_ptr + at, mask=has_scale, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        weight += tl.load(shift_ptr + at, mask=has_scale, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * K + k, weight.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """The weight as in `kernels.ops`, all contiguous -> [N, K] in dtype; as `reference.dequantize`, rounded once."""
    out_size, groups = scale.shape
    int4 = codes.dtype == torch.uint8
    size = codes.shape[1] * (2 if int4 else 1)
    out = torch.empty(out_size, size, dtype=dtype, device=codes.device)
    dequantize_kernel[-(-out_size // BLOCK_N), -(-size // BLOCK_K)](
        out,
        codes,
        scale,
        scale if shift is None else shift,
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=groups,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        INT4=int4,
        HAS_SHIFT=shift is not None,
        num_warps=NUM_WARPS,
    )
    return out
