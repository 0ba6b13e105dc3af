"""Triton: rows as e4m3 codes with a scale each, by one reading for the largest magnitude and one for the codes.

Columns come out in the order that weights of 8-bit floats have (`reference.exchanged_columns`). Knows no products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, wait
from kernels.reference import FP8_MAX

BLOCK = 2048
NUM_WARPS = 4
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LARGEST = tl.constexpr(FP8_MAX)


@triton.jit
def quantize_rows_kernel(codes_ptr, scale_ptr, x_ptr, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
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


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K], elements of a row dense -> codes float8_e4m3fn [T, K'], scale float32 [T, 1].

    As `reference.quantize_rows`, then `reference.exchanged_columns`.
    """
    rows, size = x.shape
    codes = torch.empty(rows, triton.cdiv(size, 64) * 64, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    quantize_rows_kernel[rows,](
        codes, scale, x, x.stride(0), SIZE=size, BLOCK=BLOCK, num_warps=NUM_WARPS, **dependent(x.device)
    )
    return codes, scale
