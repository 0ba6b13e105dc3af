"""Triton: RMS norm of whole rows (Zhang and Sennrich 2019), with the addition before it. One program a row.

Rounds where transformers' modules round: the sum, the scaled row, and its product with the weight; a weight in float32 beside rows
of 16 bits is of those that round once, behind the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait


@triton.jit
def scaled_rows(x, mean, eps, weight):
    """x of a row or a part of it, the mean of the row's squares, weight like x -> the norm in x's type, rounded on the way as said above."""
    scaled = x.to(tl.float32) * tl.rsqrt(mean + eps)
    if weight.dtype == x.dtype:
        scaled = scaled.to(x.dtype).to(tl.float32)
    return (scaled * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def rms_norm_kernel(
    out_ptr,
    sum_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * SIZE
    column = tl.arange(0, SIZE_PAD)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if PDL:
        wait()
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row + column, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row + column, x, mask=inside)
    wide = x.to(tl.float32)
    tl.store(out_ptr + row + column, scaled_rows(x, tl.sum(wide * wide, 0) / SIZE, eps, weight), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.ops`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(out, out, x, x, weight, eps, add=False)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops`. total: like x, where the sum is left if it is given."""
    x, residual = x.contiguous(), residual.contiguous()
    total, out = torch.empty_like(x) if total is None else total, torch.empty_like(x)
    _launch(out, total, x, residual, weight, eps, add=True)
    return total, out


def _launch(out: Tensor, total: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, add: bool) -> None:
    size = x.shape[-1]
    padded = triton.next_power_of_2(size)
    rms_norm_kernel[(x.numel() // size,)](
        out,
        total,
        x,
        residual,
        weight,
        eps,
        SIZE=size,
        SIZE_PAD=padded,
        ADD=add,
        num_warps=min(max(padded // 512, 1), 16),
        **dependent(x.device),
    )
