"""Triton: products of many tokens with the quantised weights of their experts, over the list of tiles of `kernels.moe.route`.

As `kernels.moe.grouped_gemm`, but the weight is the left operand, in registers, as in `kernels.quant.gemm_16bit`, whose loop over columns
this is: a tile is rows of an expert's weight by the rows of x that chose it. Of every 16 rows of the first weight 8 are of gate and 8 of
up, which a thread then holds both of.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.moe.activation import activate, gate_times
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.moe.route import Routes
from pagegraph.kernels.moe.tiles import GroupedTiles
from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.quant.gemm_16bit import SIZE, THREADS, places_of, scale_place, sums_of


@triton.jit(do_not_specialize=["num_slots"])
def quant_grouped_gemm_kernel(
    out_ptr,
    x_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    num_slots,
    x_stride,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,  # of the output
    HEIGHT: tl.constexpr,  # rows of an expert's weight
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    FIRST: tl.constexpr,  # of the two products
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    COLUMNS: tl.constexpr = 2 * N if GATED else N
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    dtype = out_ptr.dtype.element_ty
    thread = tl.arange(0, 2 * BLOCK_N)
    at = thread % THREADS
    if PDL:
        wait()
    for work in range(tl.program_id(0), num_slots * TILES_N, tl.num_programs(0)):
        slot = work // TILES_N
        begin = work % TILES_N * BLOCK_N
        expert = tl.load(tiles_ptr + 3 * slot)
        first = tl.load(tiles_ptr + 3 * slot + 1)
        last = tl.load(tiles_ptr + 3 * slot + 2)
        if first < last:
            # Nothing behind the last row of x is stored, nor what rows behind the expert's give.
            t = first + tl.arange(0, BLOCK_T)
            held = tl.minimum(t, last - 1)
            source = tl.load(order_ptr + held) // CHOICES if FIRST else held
            row = expert * HEIGHT + begin + thread // THREADS * SIZE
            row_block = tl.minimum(row // SIZE, EXPERTS * HEIGHT // SIZE - 1).to(tl.int64)
            qweight_at, pair_at = places_of(qweight_ptr, row_block, at, K, GROUP, GROUPS, KIND)
            x_at = x_ptr + source.to(tl.int64)[None, :] * x_stride + tl.arange(0, SIZE)[:, None]
            total = sums_of(
                x_at, (t < last)[None, :], qweight_ptr, qweight_at, scale_ptr, zero_ptr, pair_at, row, at,
                0, K, EXPERTS * HEIGHT, K, GROUP, GROUPS, BLOCK_K, KIND, WHOLE, HAS_ZERO, PRECISION,
            )  # fmt: skip
            n = begin + tl.arange(0, BLOCK_N)
            if not WHOLE:
                scale_at = scale_ptr + scale_place(expert * HEIGHT + n, KIND == "fp8")
                total *= tl.load(scale_at, mask=n < COLUMNS, other=0.0).to(tl.float32)[:, None]
            if HAS_BIAS:
                bias = tl.load(bias_ptr + expert * COLUMNS + n, mask=n < COLUMNS, other=0.0)
                total += bias.to(tl.float32)[:, None]
            if GATED:
                both = total.to(dtype).to(tl.float32).reshape(BLOCK_N // 16, 2, 8, BLOCK_T).permute(0, 2, 3, 1)
                gate, up = tl.split(both)
                result = gate_times(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT).reshape(BLOCK_N // 2, BLOCK_T)
                out_n = begin // 2 + tl.arange(0, BLOCK_N // 2)
            else:
                result = total
                if FIRST:
                    result = activate(total.to(dtype).to(tl.float32), ACTIVATION, ALPHA)
                out_n = n
            target = held if FIRST else tl.load(order_ptr + held)
            out_at = out_ptr + target.to(tl.int64)[None, :] * N + out_n[:, None]
            tl.store(out_at, result.to(dtype), mask=(out_n < N)[:, None] & (t < last)[None, :])


def quant_grouped_gemm(
    x: Tensor,
    weight: QuantStack,
    bias: Tensor | None,
    routes: Routes,
    choices: int,
    form: Form,
    first: bool,
    tiles: GroupedTiles,
    programs: int,
) -> Tensor:
    """first: rows of x [T, H] -> [T * k, I] in the order of experts; else those of that order -> [T * k, H] by pair."""
    tile, gated = tiles.up if first else tiles.down, form.gated and first
    out_size = weight.rows // 2 if gated else weight.rows
    out = torch.empty(len(routes.order), out_size, dtype=x.dtype, device=x.device)
    slots = len(routes.tiles)
    quant_grouped_gemm_kernel[(min(programs, slots * -(-weight.rows // tile.block_n)),)](
        out,
        x,
        *weight.tensors,
        bias if bias is not None else weight.scale,
        routes.order,
        routes.tiles,
        slots,
        x.stride(0),
        CHOICES=choices,
        N=out_size,
        **weight.constants,
        BLOCK_T=tiles.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        FIRST=first,
        GATED=gated,
        ACTIVATION=form.activation,
        ALPHA=form.alpha,
        LIMIT=form.limit,
        SHIFT=form.shift,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out
