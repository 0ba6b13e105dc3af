"""Triton: x @ weight.T for up to eight rows of x with a quantised weight (`reference.repack`), and a gate behind it.

A program has a few times 16 rows of the weight, or of gate and up, and all columns; its warps take blocks of 64 columns in turn, so
nothing is left to other programs to add up. A warp's values are its operand of the tensor cores as they lie; the first are on their
way before the kernel waits for those before it. Knows no models; which shapes are cut how is data in `kernels/quant/tiles.py`.

A warp takes blocks of 64 columns in turn and a program sums its own warps, so there is no split-K and no second pass.
It is the tensor core's older instruction, one warp's, whose operand is a sixteen-row part of the same layout; above 8
rows the tiles of `gemm_16bit` read x less often. A gate is computed in the same kernel; a norm is not, because
leaving its partial sums to the next kernel cost more than a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.silu_mul import silu_times
from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.quant.dequant import fetched, in_registers
from pagegraph.kernels.quant.gemm_16bit import SIZE, block_bytes, float_weight_of, groups_of, scale_place, weight_of
from pagegraph.kernels.quant.tiles import SINGLE_ROWS, QuantGemvTile
from pagegraph.kernels.quant.weight import QuantWeight

ROWS = tl.constexpr(16)  # of the weight: those of one warp's operand
EARLY = tl.constexpr(4)  # steps whose values are on their way to the L2 before the kernel waits


@triton.jit
def _part(part, at: tl.constexpr, OUT: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr):
    """Which 16 rows of the weight the part `at` of a program's is: neighbours, or first those of gate and then those of up."""
    if GATED:
        return part * (PARTS // 2) + at % (PARTS // 2) + at // (PARTS // 2) * (OUT // ROWS)
    else:
        return part * PARTS + at


@triton.jit
def _blocks(
    qweight_ptr, scale_ptr, zero_ptr, part, block, DTYPE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr, HAS_ZERO: tl.constexpr, BEYOND: tl.constexpr,
):  # fmt: skip
    """Rows 16 * part on of the weight, block `block` [threads] of 64 columns to each warp: [WARPS, 16, 64]."""
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    last: tl.constexpr = (N + SIZE - 1) // SIZE - 1
    thread = tl.arange(0, 32 * WARPS)
    row_block = tl.minimum(part // 4, last).to(tl.int64)  # nothing past the last row is stored
    at = part % 4 * 32 + thread % 32
    if BEYOND:  # x is zeros there
        block = tl.minimum(block, blocks - 1)
    if KIND == "fp8":
        weight = float_weight_of(
            qweight_ptr, scale_ptr, row_block.to(tl.int32) * SIZE, at, block * SIZE, DTYPE, N, K, GROUP, WHOLE
        )
    else:
        BYTES: tl.constexpr = block_bytes(KIND)
        qweight_at = qweight_ptr + ((row_block * blocks + block) * BYTES + at * 16)[:, None] + tl.arange(0, 16)[None, :]
        scale = tl.zeros([32 * WARPS, 2 * GROUPS], scale_ptr.dtype.element_ty)
        zero = scale
        if WHOLE:
            span: tl.constexpr = max(GROUP, SIZE)
            pair_at = ((row_block * ((K + span - 1) // span) + block * SIZE // span) * SIZE + at // 4 * 2)[
                :, None
            ] * GROUPS + tl.arange(0, 2 * GROUPS)[None, :]
            scale = tl.load(scale_ptr + pair_at)
            if HAS_ZERO:
                zero = tl.load(zero_ptr + pair_at)
        weight = weight_of(qweight_at, scale, zero, DTYPE, GROUPS, KIND, WHOLE, HAS_ZERO)
    return weight.reshape(WARPS, ROWS, SIZE)


@triton.jit
def _below(upper, lower):
    """Two [warps, rows, 64] below each other."""
    return tl.join(upper, lower).permute(0, 3, 1, 2).reshape(upper.shape[0], 2 * upper.shape[1], upper.shape[2])


@triton.jit
def parts_of(
    qweight_ptr, scale_ptr, zero_ptr, part, block, DTYPE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr, HAS_ZERO: tl.constexpr,
    BEYOND: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The rows of a program, 16 * PARTS, of block `block` [threads] of 64 columns to each warp: [WARPS, rows, 64]."""
    weight = _blocks(
        qweight_ptr, scale_ptr, zero_ptr, _part(part, 0, OUT, PARTS, GATED), block,
        DTYPE, N, K, GROUP, GROUPS, WARPS, KIND, WHOLE, HAS_ZERO, BEYOND,
    )  # fmt: skip
    if PARTS > 1:
        second = _blocks(
            qweight_ptr, scale_ptr, zero_ptr, _part(part, 1, OUT, PARTS, GATED), block,
            DTYPE, N, K, GROUP, GROUPS, WARPS, KIND, WHOLE, HAS_ZERO, BEYOND,
        )  # fmt: skip
        weight = _below(weight, second)
    if PARTS > 2:
        third = _blocks(
            qweight_ptr, scale_ptr, zero_ptr, _part(part, 2, OUT, PARTS, GATED), block,
            DTYPE, N, K, GROUP, GROUPS, WARPS, KIND, WHOLE, HAS_ZERO, BEYOND,
        )  # fmt: skip
        fourth = _blocks(
            qweight_ptr, scale_ptr, zero_ptr, _part(part, 3, OUT, PARTS, GATED), block,
            DTYPE, N, K, GROUP, GROUPS, WARPS, KIND, WHOLE, HAS_ZERO, BEYOND,
        )  # fmt: skip
        weight = _below(weight, _below(third, fourth))
    return weight


@triton.jit
def gemv_sums(
    x_at, in_t, qweight_ptr, scale_ptr, zero_ptr, part, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr, BEYOND: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The rows of a program times x at [WARPS, 64, T], of which in_t [T] are some: float32 [WARPS, rows, T], over each warp's columns."""
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    column = tl.arange(0, WARPS)[:, None, None] * SIZE + tl.arange(0, SIZE)[None, :, None]
    warp = tl.arange(0, 32 * WARPS) // 32
    total = tl.zeros([WARPS, PARTS * ROWS, in_t.shape[0]], tl.float32)
    for turn in range(0, blocks, WARPS * STEPS):
        for step in tl.static_range(STEPS):
            first = turn + step * WARPS
            inside = in_t[None, None, :]
            if BEYOND:
                inside = inside & (column < K - first * SIZE)
            x = tl.load(x_at + first * SIZE, mask=inside, other=0.0)
            weight = parts_of(
                qweight_ptr, scale_ptr, zero_ptr, part, first + warp,
                x.dtype, N, K, GROUP, GROUPS, WARPS, PARTS, KIND, WHOLE, HAS_ZERO, BEYOND, OUT, GATED,
            )  # fmt: skip
            total = tl.dot(in_registers(weight), x, total)
    return total


@triton.jit
def _ask(qweight_ptr, part, N: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr, KIND: tl.constexpr):
    """Have the values of the first steps brought to the L2."""
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    last: tl.constexpr = (N + SIZE - 1) // SIZE - 1
    BYTES: tl.constexpr = block_bytes(KIND)
    thread = tl.arange(0, 32 * WARPS)
    for step in tl.static_range(EARLY):
        block = tl.minimum(step * WARPS + thread // 32, blocks - 1)
        if KIND == "fp8":
            row = tl.minimum(part * ROWS + thread % 16, N - 1).to(tl.int64)
            fetched(qweight_ptr + row * (blocks * SIZE) + block * SIZE)
        else:
            at = (tl.minimum(part // 4, last).to(tl.int64) * blocks + block) * BYTES + part % 4 * 512 + thread % 32 * 16
            fetched(qweight_ptr + at)
            if KIND == "int8":
                fetched(qweight_ptr + at + BYTES // 2)


@triton.jit(do_not_specialize=["num_rows"])
def quant_gemv_kernel(
    out_ptr,
    x_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
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
    PARTS: tl.constexpr,  # of 16 rows, to a program
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    part = tl.program_id(0)
    OUT: tl.constexpr = N // 2 if GATED else N
    for at in tl.static_range(PARTS):
        _ask(qweight_ptr, _part(part, at, OUT, PARTS, GATED), N, K, WARPS, KIND)
    half: tl.constexpr = PARTS * ROWS // 2
    n = _part(part, 0, OUT, PARTS, GATED) * ROWS + tl.arange(0, PARTS * ROWS)  # rows of the weight
    m = n  # columns of the output
    if GATED:
        n = tl.where(tl.arange(0, PARTS * ROWS) < half, n, n - half + OUT)
        m = part * half + tl.arange(0, half)
    if not WHOLE:
        scale = tl.load(scale_ptr + scale_place(n, KIND == "fp8"), mask=n < N, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    t = tl.arange(0, T)
    in_t = t < num_rows
    column = tl.arange(0, WARPS)[:, None, None] * SIZE + tl.arange(0, SIZE)[None, :, None]
    x_at = x_ptr + column + t[None, None, :] * x_stride
    if PDL:
        wait()
    total = gemv_sums(
        x_at, in_t, qweight_ptr, scale_ptr, zero_ptr, part,
        N, K, GROUP, GROUPS, WARPS, STEPS, PARTS, KIND, WHOLE, HAS_ZERO, BEYOND, OUT, GATED,
    )  # fmt: skip
    sums = tl.sum(total, 0)
    if not WHOLE:
        sums *= scale
    if HAS_BIAS:
        sums += bias
    if GATED:  # rounds where a kernel of its own would
        gate, up = tl.split(sums.to(out_ptr.dtype.element_ty).to(tl.float32).reshape(2, half, T).permute(1, 2, 0))
        sums = silu_times(gate, up)
    tl.store(
        out_ptr + t[None, :] * OUT + m[:, None],
        sums.to(out_ptr.dtype.element_ty),
        mask=(m < OUT)[:, None] & in_t[None, :],
    )


def quant_gemv(x: Tensor, weight: QuantWeight, gated: bool, tile: QuantGemvTile) -> Tensor:
    """x [T, K] of 16 bits (rows dense, at most eight), the weight as in `kernels.ops`, all contiguous -> [T, out_size] in x's dtype.

    gated: [T, out_size / 2], silu(first half) * second half.
    """
    qweight, scale, zero, bias, group, out_size, _ = weight
    rows, size = x.shape
    width = out_size // 2 if gated else out_size
    outputs = tile.parts * ROWS.value // (2 if gated else 1)  # of a program
    if rows > SINGLE_ROWS or x.element_size() != 2 or (gated and (tile.parts == 1 or width % outputs)):
        raise ValueError(
            f"x {tuple(x.shape)} of {x.dtype}, {out_size} outputs, gated {gated}, {tile}: not a GEMV of this kernel"
        )
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    quant_gemv_kernel[(triton.cdiv(width, outputs),)](
        out,
        x,
        qweight,
        scale,
        scale if zero is None else zero,
        scale if bias is None else bias,
        rows,
        x.stride(0),
        N=out_size,
        K=size,
        GROUP=group,
        GROUPS=groups_of(scale),
        T=SINGLE_ROWS,
        WARPS=tile.warps,
        STEPS=tile.steps,
        BEYOND=size % (SIZE.value * tile.warps * tile.steps) != 0,
        PARTS=tile.parts,
        KIND=weight.kind,
        WHOLE=zero is not None or group < size,
        HAS_ZERO=zero is not None,
        HAS_BIAS=bias is not None,
        GATED=gated,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **dependent(x.device),
    )
    return out
