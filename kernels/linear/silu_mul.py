"""Triton: silu(gate) * up, the two being halves of a merged product's rows (Shazeer 2020)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def silu_times(gate, up):
    """float32 of one shape -> silu(gate) * up."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_mul_kernel(out_ptr, gate_up_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    if PDL:
        wait()
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.ops`."""
    gate_up = gate_up.contiguous()
    *batch, double = gate_up.shape
    size = double // 2
    out = torch.empty(*batch, size, dtype=gate_up.dtype, device=gate_up.device)
    silu_mul_kernel[gate_up.numel() // double, triton.cdiv(size, BLOCK)](
        out, gate_up, SIZE=size, BLOCK=BLOCK, num_warps=NUM_WARPS, **dependent(gate_up.device)
    )
    return out
