"""Triton: rows as 8-bit codes: int8 with a scale for every 128 columns, or e4m3 with one a row, with sums of columns or without.

Columns come out in the order of the weights they meet: those of `reference.int8_rows`, or of `reference.exchanged_columns` for
PyTorch's product of two e4m3. Knows no products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, wait
from kernels.reference import CODED_GROUP, FP8_MAX, INT8_MAX

COLUMNS = 2048  # of a program at a time
NUM_WARPS = 4
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LARGEST = tl.constexpr(FP8_MAX)
LARGEST_INT = tl.constexpr(INT8_MAX)
GROUP = tl.constexpr(CODED_GROUP)
ROUNDS = tl.constexpr(1.5 * 2**23)  # added to a float32 of magnitude below 2**22, leaves no room for a fraction


@triton.jit
def exchanged_e4m3_rows_kernel(codes_ptr, scale_ptr, x_ptr, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    if PDL:
        wait()
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + lane, mask=start + lane < SIZE, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=0) / LARGEST, TINY)
    tl.store(scale_ptr + row, scale)
    PADDED: tl.constexpr = (SIZE + 63) // 64 * 64
    column = lane // 64 * 64 + lane % 16 // 4 * 16 + lane % 4 // 2 * 8 + lane % 64 // 16 * 2 + lane % 2
    for start in range(0, PADDED, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + column, mask=start + column < SIZE, other=0.0).to(tl.float32)
        codes = tl.clamp(x / scale, -LARGEST, LARGEST)
        tl.store(codes_ptr + row * PADDED + start + lane, codes.to(codes_ptr.dtype.element_ty), mask=start + lane < PADDED)


def exchanged_e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K], elements of a row dense -> codes float8_e4m3fn [T, K'], scale float32 [T, 1].

    As `reference.quantize_rows`, then `reference.exchanged_columns`.
    """
    rows, size = x.shape
    codes = torch.empty(rows, triton.cdiv(size, 64) * 64, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    exchanged_e4m3_rows_kernel[rows,](
        codes, scale, x, x.stride(0), SIZE=size, BLOCK=COLUMNS, num_warps=NUM_WARPS, **dependent(x.device)
    )
    return codes, scale


@triton.jit
def _ordered(codes):
    """Codes [groups, 128] -> the same in the order of `reference.int8_rows`."""
    return codes.reshape(codes.shape[0], GROUP // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(codes.shape[0], GROUP)


@triton.jit(do_not_specialize=["rows"])
def int8_rows_kernel(codes_ptr, scale_ptr, x_ptr, x_stride, rows, filled, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # BLOCK counts groups
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if PDL:
        wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=(column < SIZE) & (row < rows), other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST_INT, TINY)
    codes = (x * (1.0 / scale)[:, None] + ROUNDS) - ROUNDS
    tl.store(scale_ptr + group * filled + row, scale, mask=group < GROUPS)
    tl.store(codes_ptr + row * (GROUPS * GROUP) + column, _ordered(codes.to(tl.int8)), mask=(group < GROUPS)[:, None])


def int8_rows(x: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """x [T, K], elements of a row dense -> codes int8 [T', K'], scale float32 [K' / 128, T'].

    The first T rows are as `reference.int8_rows`; T' is a multiple of `multiple`, and the rest is zeros.
    """
    rows, size = x.shape
    filled, groups = triton.cdiv(rows, multiple) * multiple, triton.cdiv(size, CODED_GROUP)
    codes = torch.empty(filled, groups * CODED_GROUP, dtype=torch.int8, device=x.device)
    scale = torch.empty(groups, filled, dtype=torch.float32, device=x.device)
    block = min(COLUMNS // CODED_GROUP, triton.next_power_of_2(groups))
    int8_rows_kernel[filled, triton.cdiv(groups, block)](
        codes, scale, x, x.stride(0), rows, filled, SIZE=size, GROUPS=groups, BLOCK=block, num_warps=NUM_WARPS, **dependent(x.device)
    )
    return codes, scale


@triton.jit
def _rounded(x):
    """float32 -> the nearest with three bits behind the point, half to even: what e4m3 holds of all but the smallest.

    Not by e4m3 and back, which ptxas of CUDA 12.8 gets wrong where the codes are stored too.
    """
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def e4m3_rows_kernel(
    codes_ptr, scale_ptr, sum_ptr, x_ptr, x_stride, rows, filled, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # BLOCK counts groups: all of a row
    group = tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if PDL:
        wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=(column < SIZE) & (row < rows), other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0) / LARGEST, TINY)
    codes = _rounded(tl.clamp(x * (1.0 / scale), -LARGEST, LARGEST))
    tl.store(scale_ptr + row, scale)
    tl.store(sum_ptr + group * filled + row, tl.sum(codes, axis=1), mask=group < GROUPS)
    tl.store(codes_ptr + row * (GROUPS * GROUP) + column, _ordered(codes.to(codes_ptr.dtype.element_ty)), mask=(group < GROUPS)[:, None])


def e4m3_rows(x: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K], elements of a row dense -> codes float8_e4m3fn [T', K'], scale float32 [T'], sums of codes float32 [K' / 128, T'].

    The first T rows are as `reference.e4m3_rows`; T' is a multiple of `multiple`, and the rest is zeros.
    """
    rows, size = x.shape
    filled, groups = triton.cdiv(rows, multiple) * multiple, triton.cdiv(size, CODED_GROUP)
    codes = torch.empty(filled, groups * CODED_GROUP, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(filled, dtype=torch.float32, device=x.device)
    sums = torch.empty(groups, filled, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(groups)
    e4m3_rows_kernel[filled,](
        codes, scale, sums, x, x.stride(0), rows, filled, SIZE=size, GROUPS=groups, BLOCK=block, num_warps=2 * NUM_WARPS, **dependent(x.device)
    )
    return codes, scale, sums
