"""Triton: rows as 8-bit values: int8 with a scale for every 128 columns, or e4m3 with one a row, with sums of columns or without.

What comes before may be done on the way, rounded as by a kernel of its own: an RMS norm with the addition before it, or a gate.
Columns come out in the order of the weights they meet: those of `reference.int8_rows`, or of `reference.exchanged_columns` for
PyTorch's GEMM of two e4m3. One program a row. Knows no products.

What is ahead of a GEMM with 8-bit activations (addition with its norm, or a gate) is done by the kernel that
quantises them. One op holds norm and GEMM, or norm, gate and two GEMMs, because only at the launch is it known
whether activations are quantised. Scales come from each token; those that a checkpoint stores are not used. Of NaN
the scale is NaN: 8 bits need not hold it, and the products of the row come out as NaN, those of other rows as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.dtypes import FP8_MAX, INT8_MAX
from pagegraph.kernels.linear.rms_norm import scaled_rows
from pagegraph.kernels.linear.silu_mul import silu_times
from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.quant.reference import ACTIVATION_GROUP

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LARGEST = tl.constexpr(FP8_MAX)
LARGEST_INT = tl.constexpr(INT8_MAX)
GROUP = tl.constexpr(ACTIVATION_GROUP)
ROUNDS = tl.constexpr(1.5 * 2**23)  # added to a float32 of magnitude below 2**22, leaves no room for a fraction


class Norm(NamedTuple):
    """An addition and an RMS norm ahead of a rounding: rows x + residual go to `total`, and normed on."""

    weight: Tensor  # [K]
    eps: float
    residual: Tensor  # [T, K], dense
    total: Tensor  # [T, K], dense; written


@triton.jit
def _rounded(x):
    """float32 -> the nearest with three bits behind the point, half to even: what e4m3 holds of all but the smallest.

    Not by e4m3 and back, which ptxas of CUDA 12.8 gets wrong where the quantised values are stored too.
    """
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).to(tl.float32, bitcast=True)


@triton.jit
def _largest(x):
    """The largest magnitude of a float32 tensor's last dimension; NaN where there is one, which a maximum of floats drops."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=len(x.shape) - 1).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "filled"])
def rows_kernel(
    x_q_ptr, scale_ptr, sum_ptr, x_ptr, weight_ptr, eps, residual_ptr, total_ptr, x_stride, rows, filled,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,  # groups of 128 columns; those that are allotted
    NORM: tl.constexpr, GATED: tl.constexpr, INT8: tl.constexpr, EXCHANGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (column < SIZE) & (row < rows)
    if NORM:
        weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0)
    if PDL:
        wait()
    states = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    x = states.to(tl.float32)
    if NORM:
        states = (x + tl.load(residual_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)).to(
            states.dtype
        )
        tl.store(total_ptr + row * SIZE + column, states, mask=inside)
        x = states.to(tl.float32)
        x = scaled_rows(states, tl.sum(tl.sum(x * x, axis=1), axis=0) / SIZE, eps, weight).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + row * x_stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
        x = silu_times(x, up).to(states.dtype).to(tl.float32)
    largest = _largest(x)
    if INT8:
        scale = tl.maximum(largest / LARGEST_INT, TINY, propagate_nan=tl.PropagateNan.ALL)
        x_q = (x * (1.0 / scale)[:, None] + ROUNDS) - ROUNDS
        tl.store(scale_ptr + group * filled + row, scale, mask=group < GROUPS)
    else:
        scale = tl.maximum(_largest(largest) / LARGEST, TINY, propagate_nan=tl.PropagateNan.ALL)
        x_q = tl.clamp(x * (1.0 / scale), -LARGEST, LARGEST)
        tl.store(scale_ptr + row, scale)
        if not EXCHANGED:
            x_q = _rounded(x_q)
            tl.store(sum_ptr + group * filled + row, tl.sum(x_q, axis=1), mask=group < GROUPS)
    x_q = x_q.to(x_q_ptr.dtype.element_ty)
    if EXCHANGED:
        PADDED: tl.constexpr = (SIZE + 63) // 64 * 64
        x_q = x_q.reshape(BLOCK * 2, 4, 2, 4, 2).permute(0, 3, 1, 2, 4).reshape(BLOCK, GROUP)
        tl.store(x_q_ptr + row * PADDED + column, x_q, mask=column < PADDED)
    else:
        x_q = x_q.reshape(BLOCK, GROUP // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BLOCK, GROUP)
        tl.store(x_q_ptr + row * (GROUPS * GROUP) + column, x_q, mask=(group < GROUPS)[:, None])


def width(x: Tensor, gated: bool) -> int:
    """Columns of what is quantised: of rows behind a gate half as many as x has."""
    return x.shape[1] // 2 if gated else x.shape[1]


def int8_rows(x: Tensor, multiple: int, norm: Norm | None = None, gated: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, K], elements of a row dense -> x_q int8 [T', K'], scale float32 [K' / 128, T'].

    The first T rows are as `reference.int8_rows`; T' is a multiple of `multiple`, and the rest is zeros. gated: x is [T, 2 * K],
    and what is quantised silu(first half) * second half.
    """
    size = width(x, gated)
    filled, groups = triton.cdiv(len(x), multiple) * multiple, triton.cdiv(size, ACTIVATION_GROUP)
    x_q = torch.empty(filled, groups * ACTIVATION_GROUP, dtype=torch.int8, device=x.device)
    scale = torch.empty(groups, filled, dtype=torch.float32, device=x.device)
    _launch(x_q, scale, scale, x, size, norm, gated)
    return x_q, scale


def e4m3_rows(x: Tensor, multiple: int, norm: Norm | None = None, gated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """As `int8_rows` -> x_q float8_e4m3fn [T', K'], scale float32 [T'], sums of every 128 values float32 [K' / 128, T'], as `reference.e4m3_rows`."""
    size = width(x, gated)
    filled, groups = triton.cdiv(len(x), multiple) * multiple, triton.cdiv(size, ACTIVATION_GROUP)
    x_q = torch.empty(filled, groups * ACTIVATION_GROUP, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(filled, dtype=torch.float32, device=x.device)
    sums = torch.empty(groups, filled, dtype=torch.float32, device=x.device)
    _launch(x_q, scale, sums, x, size, norm, gated)
    return x_q, scale, sums


def exchanged_e4m3_rows(x: Tensor, norm: Norm | None = None, gated: bool = False) -> tuple[Tensor, Tensor]:
    """As `int8_rows`, without rows of zeros -> x_q float8_e4m3fn [T, K'], K' a multiple of 64, scale float32 [T, 1].

    As `reference.quantize_rows`, then `reference.exchanged_columns`.
    """
    size = width(x, gated)
    x_q = torch.empty(len(x), triton.cdiv(size, 64) * 64, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _launch(x_q, scale, scale, x, size, norm, gated, exchanged=True)
    return x_q, scale


def _launch(
    x_q: Tensor,
    scale: Tensor,
    sums: Tensor,
    x: Tensor,
    size: int,
    norm: Norm | None,
    gated: bool,
    exchanged: bool = False,
) -> None:
    groups = triton.cdiv(size, ACTIVATION_GROUP)
    block = triton.next_power_of_2(groups)
    rows_kernel[(len(x_q),)](
        x_q,
        scale,
        sums,
        x,
        x if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        x if norm is None else norm.residual,
        x if norm is None else norm.total,
        x.stride(0),
        len(x),
        len(x_q),
        SIZE=size,
        GROUPS=groups,
        BLOCK=block,
        NORM=norm is not None,
        GATED=gated,
        INT8=x_q.dtype == torch.int8,
        EXCHANGED=exchanged,
        num_warps=min(max(block * ACTIVATION_GROUP // 1024, 1), 16),
        **dependent(x.device),
    )
