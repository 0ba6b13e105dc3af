"""Triton: rows as e4m3 or int8 codes with a scale each, by one reading for the largest magnitude and one for the codes.

int8 in one digit or two, the second being what rounding to the first leaves. Knows no products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, wait
from kernels.reference import FP8_MAX, INT8_MAX, SECOND_DIGIT

BLOCK = 2048
NUM_WARPS = 4
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
WHOLE = tl.constexpr(1.5 * 2**23)  # added to a small float32 and taken off again it leaves the nearest whole number, of two the even one
SECOND = tl.constexpr(SECOND_DIGIT)


@triton.jit
def quantize_rows_kernel(
    codes_ptr, scale_ptr, x_ptr, x_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, DIGITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
    for start in range(0, SIZE, BLOCK):
        inside = start + lane < SIZE
        x = tl.load(x_ptr + row * x_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
        codes = tl.clamp(x / scale, -LARGEST, LARGEST)
        at = codes_ptr + row * SIZE + start + lane
        if codes_ptr.dtype.element_ty == tl.int8:
            exact = codes
            codes = exact + WHOLE - WHOLE
            if DIGITS == 2:
                low = tl.clamp((exact - codes) * SECOND + WHOLE - WHOLE, -LARGEST, LARGEST)
                tl.store(at + tl.num_programs(0).to(tl.int64) * SIZE, low.to(tl.int8), mask=inside)
        tl.store(at, codes.to(codes_ptr.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, digits: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, K], elements of a row dense -> codes [digits * T, K], scale float32 [T, 1].

    As `reference.quantize_rows` to float8_e4m3fn or int8; two digits, of int8, as `reference.two_digits`, all low ones after all high ones.
    """
    rows, size = x.shape
    codes = torch.empty(digits * rows, size, dtype=dtype, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    quantize_rows_kernel[rows,](
        codes,
        scale,
        x,
        x.stride(0),
        SIZE=size,
        BLOCK=BLOCK,
        LARGEST=INT8_MAX if dtype == torch.int8 else FP8_MAX,
        DIGITS=digits,
        num_warps=NUM_WARPS,
        **dependent(x.device),
    )
    return codes, scale
