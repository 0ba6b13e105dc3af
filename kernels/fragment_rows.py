"""Triton: x @ weight.T for up to eight rows of x with a weight of codes (`reference.fragments`), and what stands around it.

A program has 16 rows of the weight, or of gate and up, and all columns; its warps take blocks of 64 columns in turn, so nothing is
left to other programs to add up. A warp's codes are its operand of the matrix unit as they lie. A norm between two products
costs no kernel: the one before leaves its sum, its sum times the norm's weight, and each program's part of the squares; the scale
of a row is known when the product after it is. Knows no models; which shapes are cut how is data in `kernels/quant_tiles.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fragment_linear import KINDS, SIZE, _float_weight, _groups, _weight
from kernels.launch import dependent, wait
from kernels.quant_tiles import SINGLE_ROWS, RowsTile
from kernels.widen import fetched, in_registers

ROWS = tl.constexpr(16)  # of the weight, to a program: those of one warp's operand
EARLY = tl.constexpr(4)  # steps whose codes are on their way to the L2 before the kernel waits


@triton.jit
def _blocks(
    codes_ptr, scale_ptr, shift_ptr, part, first, DTYPE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BEYOND: tl.constexpr,
):  # fmt: skip
    """Rows 16 * part on of the weight, a block of 64 columns to each warp from block `first` on: [WARPS, 16, 64]."""
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    thread = tl.arange(0, 32 * WARPS)
    row_block = (part // 4).to(tl.int64)
    at = part % 4 * 32 + thread % 32
    block = first + thread // 32
    if BEYOND:  # x is zeros there
        block = tl.minimum(block, blocks - 1)
    if KIND == "fp8":
        weight = _float_weight(codes_ptr, scale_ptr, row_block.to(tl.int32) * SIZE, at, block * SIZE, DTYPE, N, K, GROUP, WHOLE)
    else:
        BYTES: tl.constexpr = SIZE * SIZE // 2 if KIND == "int4" else SIZE * SIZE
        codes_at = codes_ptr + ((row_block * blocks + block) * BYTES + at * 16)[:, None] + tl.arange(0, 16)[None, :]
        scale = tl.zeros([32 * WARPS, 2 * GROUPS], scale_ptr.dtype.element_ty)
        shift = scale
        if WHOLE:
            span: tl.constexpr = max(GROUP, SIZE)
            pair_at = ((row_block * ((K + span - 1) // span) + block * SIZE // span) * SIZE + at // 4 * 2)[:, None] * GROUPS + tl.arange(0, 2 * GROUPS)[None, :]
            scale = tl.load(scale_ptr + pair_at)
            if HAS_SHIFT:
                shift = tl.load(shift_ptr + pair_at)
        weight = _weight(codes_at, scale, shift, DTYPE, GROUPS, KIND == "int4", WHOLE, HAS_SHIFT)
    return in_registers(weight.reshape(WARPS, ROWS, SIZE))


@triton.jit
def _ask(codes_ptr, part, N: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr, KIND: tl.constexpr):
    """Have the codes of the first steps brought to the L2."""
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    BYTES: tl.constexpr = SIZE * SIZE // 2 if KIND == "int4" else SIZE * SIZE
    thread = tl.arange(0, 32 * WARPS)
    for step in tl.static_range(EARLY):
        block = tl.minimum(step * WARPS + thread // 32, blocks - 1)
        if KIND == "fp8":
            row = tl.minimum(part * ROWS + thread % 16, N - 1).to(tl.int64)
            fetched(codes_ptr + row * (blocks * SIZE) + block * SIZE)
        else:
            at = ((part // 4).to(tl.int64) * blocks + block) * BYTES + part % 4 * 512 + thread % 32 * 16
            fetched(codes_ptr + at)
            if KIND == "int8":
                fetched(codes_ptr + at + BYTES // 2)


@triton.jit
def _scaled(total, scale_ptr, bias_ptr, part, N: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, by_row):
    """Sums [16, T] of rows 16 * part on with what is known of each row of the weight, and of x."""
    n = part * ROWS + tl.arange(0, ROWS)
    if not WHOLE:
        scale_at = n if KIND == "fp8" else n // 16 * 16 + n % 8 * 2 + n % 16 // 8
        total *= tl.load(scale_ptr + scale_at, mask=n < N, other=0.0).to(tl.float32)[:, None]
    total *= by_row
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["num_rows"])
def fragment_rows_kernel(
    out_ptr,
    gained_ptr,
    left_ptr,
    x_ptr,
    codes_ptr,
    scale_ptr,
    shift_ptr,
    bias_ptr,
    residual_ptr,
    gain_ptr,
    squares_ptr,
    eps,
    num_rows,
    x_stride,
    N: tl.constexpr,  # rows of the weight
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    T: tl.constexpr,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    BEYOND: tl.constexpr,  # the last turn goes past the columns
    PARTS: tl.constexpr,  # of the squares of x; 0: x is not to be normalised
    EACH: tl.constexpr,  # the power of two not below
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    part = tl.program_id(0)
    OUT: tl.constexpr = N // 2 if GATED else N
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    _ask(codes_ptr, part, N, K, WARPS, KIND)
    if GATED:
        _ask(codes_ptr, part + OUT // ROWS, N, K, WARPS, KIND)
    t = tl.arange(0, T)
    in_t = t < num_rows
    column = tl.arange(0, WARPS)[:, None, None] * SIZE + tl.arange(0, SIZE)[None, :, None]
    x_at = x_ptr + column + t[None, None, :] * x_stride
    if PDL:
        wait()
    total = tl.zeros([WARPS, ROWS, T], tl.float32)
    other = total
    for first in range(0, blocks, WARPS * STEPS):
        for step in tl.static_range(STEPS):
            block = first + step * WARPS
            inside = in_t[None, None, :]
            if BEYOND:
                inside = inside & (column < K - block * SIZE)
            x = tl.load(x_at + block * SIZE, mask=inside, other=0.0)
            weight = _blocks(codes_ptr, scale_ptr, shift_ptr, part, block, x.dtype, N, K, GROUP, GROUPS, WARPS, KIND, WHOLE, HAS_SHIFT, BEYOND)
            total = tl.dot(weight, x, total)
            if GATED:
                weight = _blocks(codes_ptr, scale_ptr, shift_ptr, part + OUT // ROWS, block, x.dtype, N, K, GROUP, GROUPS, WARPS, KIND, WHOLE, HAS_SHIFT, BEYOND)
                other = tl.dot(weight, x, other)
    by_row = 1.0
    if PARTS:
        each = tl.arange(0, EACH)
        squares = tl.load(squares_ptr + t[None, :] * PARTS + each[:, None], mask=in_t[None, :] & (each < PARTS)[:, None], other=0.0)
        by_row = tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
    dtype = out_ptr.dtype.element_ty
    # Rounds where kernels of their own would.
    sums = _scaled(tl.sum(total, 0), scale_ptr, bias_ptr, part, N, KIND, WHOLE, HAS_BIAS, by_row).to(dtype).to(tl.float32)
    if GATED:
        up = _scaled(tl.sum(other, 0), scale_ptr, bias_ptr, part + OUT // ROWS, N, KIND, WHOLE, HAS_BIAS, by_row).to(dtype).to(tl.float32)
        sums = sums * tl.sigmoid(sums) * up
    n = part * ROWS + tl.arange(0, ROWS)
    inside = (n < OUT)[:, None] & in_t[None, :]
    at = t[None, :] * OUT + n[:, None]
    if HAS_RESIDUAL:
        sums += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rounded = sums.to(dtype)
    tl.store(out_ptr + at, rounded, mask=inside)
    if HAS_GAIN:
        wide = tl.where(inside, rounded.to(tl.float32), 0.0)
        gain = tl.load(gain_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
        tl.store(gained_ptr + at, (wide * gain).to(dtype), mask=inside)
        tl.store(left_ptr + t * tl.num_programs(0) + part, tl.sum(wide * wide, 0), mask=in_t)


def fragment_rows(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    out_size: int,
    tile: RowsTile,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K] of 16 bits (rows dense, at most eight), the weight as in `kernels.ops`, all contiguous -> three tensors.

    The result [T, out_size] in x's dtype: with residual [T, out_size] added where given; gated, [T, out_size / 2], silu(first half)
    * second half. gain [out_size]: the second is the result times it, the third float32 [T, parts] the parts of its rows' squares;
    else they are the result. squares: such parts of what x was before its gain; the product is that of x's RMS norm with eps.
    """
    rows, size = x.shape
    width = out_size // 2 if gated else out_size
    if rows > SINGLE_ROWS or x.element_size() != 2 or (gated and width % ROWS.value):
        raise ValueError(f"x {tuple(x.shape)} of {x.dtype} and {out_size} outputs, gated {gated}: not a product of this kernel")
    parts = 0 if squares is None else squares.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(width, ROWS.value)
    gained, left = out, out
    if gain is not None:
        gained, left = torch.empty_like(out), torch.empty(rows, programs, dtype=torch.float32, device=x.device)
    fragment_rows_kernel[(programs,)](
        out,
        gained,
        left,
        x,
        codes,
        scale,
        scale if shift is None else shift,
        scale if bias is None else bias,
        out if residual is None else residual,
        out if gain is None else gain,
        left if squares is None else squares,
        eps,
        rows,
        x.stride(0),
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=_groups(scale),
        T=SINGLE_ROWS,
        WARPS=tile.warps,
        STEPS=tile.steps,
        BEYOND=size % (SIZE.value * tile.warps * tile.steps) != 0,
        PARTS=parts,
        EACH=triton.next_power_of_2(max(parts, 1)),
        KIND=KINDS[codes.dtype],
        WHOLE=shift is not None or group < size,
        HAS_SHIFT=shift is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_GAIN=gain is not None,
        GATED=gated,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **dependent(x.device),
    )
    return out, gained, left
