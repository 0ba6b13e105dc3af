"""Triton: rows and weight both as int8 codes with a scale a row: products of integers, scaled once at the end.

For many rows, where operations count and not bytes: the matrix unit takes twice as many of these as of bfloat16. Rows come in
one digit or in two, which share every weight that is read. Knows sizes; how many digits is decided elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent, wait
from kernels.reference import SECOND_DIGIT

BLOCK_T, BLOCK_N, BLOCK_K = 128, 128, 128
FEW_TILES = 264  # two on each multiprocessor of an H100 or H200: with fewer, tiles are halved
TOGETHER = 8  # blocks of rows that run side by side, so that they find weights and each other's rows in the L2
NUM_WARPS, NUM_STAGES = 8, 3
SECOND = tl.constexpr(SECOND_DIGIT)


@triton.jit(do_not_specialize=["num_rows"])
def scaled_int8_kernel(
    out_ptr,
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    DIGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, BLOCK_T)
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = program // (TOGETHER * tiles) * TOGETHER
    together = min(row_blocks - first, TOGETHER)
    row_block = first + program % (TOGETHER * tiles) % together
    tile = program % (TOGETHER * tiles) // together
    t = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the last are those of the last again: nothing of them is stored.
    x_at = x_ptr + tl.minimum(t, num_rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    codes_at = codes_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    if PDL:
        wait()
    low_at = x_at + num_rows.to(tl.int64) * K
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.int32)
    low_total = total
    for at in range(0, K, BLOCK_K):
        inside = k < K - at  # always, where BLOCK_K divides K
        if K % BLOCK_K == 0:
            codes = tl.load(codes_at + at)
            x = tl.load(x_at + at)
        else:
            codes = tl.load(codes_at + at, mask=inside[:, None], other=0)
            x = tl.load(x_at + at, mask=inside[None, :], other=0)
        total = tl.dot(x, codes, total, out_dtype=tl.int32)
        if DIGITS == 2:
            if K % BLOCK_K == 0:
                low = tl.load(low_at + at)
            else:
                low = tl.load(low_at + at, mask=inside[None, :], other=0)
            low_total = tl.dot(low, codes, low_total, out_dtype=tl.int32)
    in_t, in_n = t < num_rows, n < N
    x_scale = tl.load(x_scale_ptr + t, mask=in_t, other=0.0)
    scale = tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    sums = total.to(tl.float32)
    if DIGITS == 2:
        sums += low_total.to(tl.float32) / SECOND
    out = sums * x_scale[:, None] * scale[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=in_t[:, None] & in_n[None, :])


def scaled_int8(x_codes: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x_codes int8 [T or 2 * T, K] of scale float32 [T, 1], codes int8 [N, K] of scale [N, 1], all contiguous -> [T, N] in dtype.

    Where x_codes has two digits, the low ones are its second half, as `quantize_rows` leaves them. bias [N].
    """
    rows, size = len(x_scale), x_codes.shape[1]
    digits = len(x_codes) // rows
    out_size = len(codes)
    out = torch.empty(rows, out_size, dtype=dtype, device=codes.device)
    row_blocks = triton.cdiv(rows, BLOCK_T)
    block_n = BLOCK_N if digits == 1 and row_blocks * triton.cdiv(out_size, BLOCK_N) >= FEW_TILES else BLOCK_N // 2
    scaled_int8_kernel[row_blocks * triton.cdiv(out_size, block_n),](
        out,
        x_codes,
        x_scale,
        codes,
        scale,
        scale if bias is None else bias,
        rows,
        N=out_size,
        K=size,
        BLOCK_T=BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        TOGETHER=TOGETHER,
        DIGITS=digits,
        HAS_BIAS=bias is not None,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        **dependent(codes.device),
    )
    return out
