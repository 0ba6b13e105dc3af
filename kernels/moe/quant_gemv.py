"""Triton: experts of a few tokens with quantised weights in the tensor cores' layout, two kernels as in `kernels.moe.gemv`.

The weights of all experts are one tall weight for the loads of `kernels.quant.gemv`, in which an expert begins at its number times its
rows. The first kernel has a token's row and a choice to a program. In the second a program has a token, and its warps take choices side
by side, so that all are on their way at once. x is one column of the eight that the tensor cores' instruction has; the others are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.moe.activation import activate, gate_times
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.gemv import choice_of
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.quant.dequant import in_registers
from pagegraph.kernels.quant.gemm_16bit import SIZE, scale_place
from pagegraph.kernels.quant.gemv import ROWS, gemv_sums, parts_of
from pagegraph.kernels.quant.tiles import QuantGemvTile

EIGHT = tl.constexpr(8)  # columns of x in an instruction, and neighbouring rows of gate or up
MOST_TOGETHER = 8  # choices that the warps of a program take side by side


@triton.jit
def quant_experts_up_kernel(
    out_ptr,
    x_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    chosen_ptr,
    live_ptr,
    x_stride,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,  # of the output
    HEIGHT: tl.constexpr,  # rows of an expert's weight
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    BEYOND: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    pair = tl.program_id(0)
    part = tl.program_id(1)
    PROGRAM: tl.constexpr = PARTS * ROWS
    COLUMNS: tl.constexpr = 2 * N if GATED else N
    n = part * PROGRAM + tl.arange(0, PROGRAM)
    place = tl.arange(0, WARPS)[:, None, None] * SIZE + tl.arange(0, SIZE)[None, :, None]
    t = tl.arange(0, EIGHT)
    if PDL:
        wait()
    expert, valid = choice_of(chosen_ptr, live_ptr, pair, CHOICES, EXPERTS, HAS_LIVE)
    if valid:
        x_at = x_ptr + (pair // CHOICES).to(tl.int64) * x_stride + place + 0 * t[None, None, :]
        total = gemv_sums(
            x_at, t < 1, qweight_ptr, scale_ptr, zero_ptr, expert * (HEIGHT // PROGRAM) + part,
            EXPERTS * HEIGHT, K, GROUP, GROUPS, WARPS, STEPS, PARTS, KIND, WHOLE, HAS_ZERO, BEYOND, HEIGHT, False,
        )  # fmt: skip
        sums = tl.sum(tl.sum(total, 0), 1)
        if not WHOLE:
            sums *= tl.load(scale_ptr + scale_place(expert * HEIGHT + n, KIND == "fp8")).to(tl.float32)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + expert * COLUMNS + n, mask=n < COLUMNS, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        sums = sums.to(dtype).to(tl.float32)  # as a product of its own would be
        if GATED:
            gate, up = tl.split(sums.reshape(PARTS, 2, EIGHT).permute(0, 2, 1))
            result = gate_times(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT).reshape(PROGRAM // 2)
            m = part * (PROGRAM // 2) + tl.arange(0, PROGRAM // 2)
        else:
            result = activate(sums, ACTIVATION, ALPHA)
            m = n
        tl.store(out_ptr + pair.to(tl.int64) * N + m, result.to(dtype), mask=m < N)


@triton.jit
def quant_experts_down_kernel(
    out_ptr,
    inner_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    chosen_ptr,
    weight_ptr,  # of routing
    live_ptr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    HEIGHT: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    TOGETHER: tl.constexpr,  # choices that warps take side by side; several warps share the columns of one
    STEPS: tl.constexpr,
    BEYOND: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0)
    part = tl.program_id(1)
    PROGRAM: tl.constexpr = PARTS * ROWS
    SHARES: tl.constexpr = WARPS // TOGETHER
    blocks: tl.constexpr = (K + SIZE - 1) // SIZE
    n = part * PROGRAM + tl.arange(0, PROGRAM)
    warp = tl.arange(0, WARPS)
    of_thread = tl.arange(0, 32 * WARPS) // 32
    column = (warp // TOGETHER)[:, None, None] * SIZE + tl.arange(0, SIZE)[None, :, None]
    t = tl.arange(0, EIGHT)[None, None, :]
    out = tl.zeros([PROGRAM], tl.float32)
    if PDL:
        wait()
    is_live = True
    if HAS_LIVE:
        is_live = token < tl.load(live_ptr)
    if is_live:
        for begin in tl.static_range(0, CHOICES, TOGETHER):
            # A warp without a choice reads what another reads, and counts nothing.
            asked = token * CHOICES + tl.minimum(begin + of_thread % TOGETHER, CHOICES - 1)
            read, known = choice_of(chosen_ptr, live_ptr, asked, CHOICES, EXPERTS, HAS_LIVE)
            tall = tl.where(known, read, 0) * (HEIGHT // PROGRAM) + part
            choice = begin + warp % TOGETHER
            pair = token * CHOICES + tl.minimum(choice, CHOICES - 1)
            expert, valid = choice_of(chosen_ptr, live_ptr, pair, CHOICES, EXPERTS, HAS_LIVE)
            valid = valid & (choice < CHOICES)
            expert = tl.where(valid, expert, 0)
            x_at = inner_ptr + pair.to(tl.int64)[:, None, None] * K + column + 0 * t
            total = tl.zeros([WARPS, PROGRAM, EIGHT], tl.float32)
            for turn in range(0, blocks, SHARES * STEPS):
                for step in tl.static_range(STEPS):
                    first = turn + step * SHARES
                    inside = (t < 1) & valid[:, None, None]
                    if BEYOND:
                        inside = inside & (column < K - first * SIZE)
                    x = tl.load(x_at + first * SIZE, mask=inside, other=0.0)
                    weight = parts_of(
                        qweight_ptr, scale_ptr, zero_ptr, tall, first + of_thread // TOGETHER, x.dtype, EXPERTS * HEIGHT,
                        K, GROUP, GROUPS, WARPS, PARTS, KIND, WHOLE, HAS_ZERO, BEYOND, HEIGHT, False,
                    )  # fmt: skip
                    total = tl.dot(in_registers(weight), x, total)
            sums = tl.sum(total, 2)
            if not WHOLE:
                place = scale_place(expert[:, None] * HEIGHT + n[None, :], KIND == "fp8")
                sums *= tl.load(scale_ptr + place).to(tl.float32)
            if HAS_BIAS:
                once = valid & (warp < TOGETHER)
                bias_at = bias_ptr + expert[:, None] * N + n[None, :]
                sums += tl.load(bias_at, mask=once[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
            share = tl.load(weight_ptr + pair, mask=valid, other=0.0).to(tl.float32)
            out += tl.sum(sums * share[:, None], 0)
    tl.store(out_ptr + token.to(tl.int64) * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


def quant_experts_up(
    x: Tensor,
    chosen: Tensor,
    weight: QuantStack,
    bias: Tensor | None,
    live: Tensor | None,
    form: Form,
    tile: QuantGemvTile,
) -> Tensor:
    """What the second product takes of each pair: [T * k, I]; rows of no expert are not written."""
    inner = weight.rows // 2 if form.gated else weight.rows
    out = torch.empty(chosen.numel(), inner, dtype=x.dtype, device=x.device)
    quant_experts_up_kernel[len(out), -(-weight.rows // (tile.parts * ROWS.value))](
        out,
        x,
        *weight.tensors,
        bias if bias is not None else weight.scale,
        chosen,
        live if live is not None else chosen,
        x.stride(0),
        CHOICES=chosen.shape[1],
        N=inner,
        **weight.constants,
        WARPS=tile.warps,
        STEPS=tile.steps,
        BEYOND=weight.size % (SIZE.value * tile.warps * tile.steps) != 0,
        PARTS=tile.parts,
        GATED=form.gated,
        ACTIVATION=form.activation,
        ALPHA=form.alpha,
        LIMIT=form.limit,
        SHIFT=form.shift,
        HAS_BIAS=bias is not None,
        HAS_LIVE=live is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **dependent(x.device),
    )
    return out


def quant_experts_down(
    inner: Tensor,
    chosen: Tensor,
    weights: Tensor,
    weight: QuantStack,
    bias: Tensor | None,
    live: Tensor | None,
    tile: QuantGemvTile,
) -> Tensor:
    """The weighted sum over a token's choices of inner [T * k, I] times their weight: [T, H]."""
    tokens, choices = chosen.shape
    together = min(MOST_TOGETHER, triton.next_power_of_2(choices))
    warps = max(tile.warps, together)
    out = torch.empty(tokens, weight.rows, dtype=inner.dtype, device=inner.device)
    quant_experts_down_kernel[tokens, -(-weight.rows // (tile.parts * ROWS.value))](
        out,
        inner,
        *weight.tensors,
        bias if bias is not None else weight.scale,
        chosen,
        weights,
        live if live is not None else chosen,
        CHOICES=choices,
        N=weight.rows,
        **weight.constants,
        WARPS=warps,
        TOGETHER=together,
        STEPS=tile.steps,
        BEYOND=weight.size % (SIZE.value * (warps // together) * tile.steps) != 0,
        PARTS=tile.parts,
        HAS_BIAS=bias is not None,
        HAS_LIVE=live is not None,
        num_warps=warps,
        num_stages=tile.stages,
        **dependent(inner.device),
    )
    return out
