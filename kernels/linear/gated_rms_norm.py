"""Triton: RMS norm of each head's or group's rows with a gate ahead of it or behind. See `kernels.ops`.

Rounds where transformers' modules round: behind a norm whose x is of 16 bits, and behind its product with the weight where the gate
comes then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.silu_mul import silu_times
from pagegraph.kernels.pdl import dependent, wait

ELEMENTS = 1024  # of a program: rows side by side where they are short
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def gated_rms_norm_kernel(
    out_ptr, x_ptr, gate_ptr, weight_ptr, num_rows, gate_stride, gate_heads, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr, PER_HEAD: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (column < SIZE)
    weight_at = column + (head * SIZE)[:, None] if PER_HEAD else column + (row * 0)[:, None]
    weight = tl.load(weight_ptr + weight_at, mask=inside, other=0.0)
    if PDL:
        wait()
    place = row.to(tl.int64)[:, None] * SIZE + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    gate_at = (row // HEADS).to(tl.int64) * gate_stride + head * gate_heads
    gate = tl.load(gate_ptr + gate_at[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    if GATE_FIRST:
        wide = silu_times(gate, wide)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)[:, None]).to(x.dtype).to(tl.float32)
    scaled *= weight.to(tl.float32)
    if not GATE_FIRST:
        if weight.dtype == x.dtype:
            scaled = scaled.to(x.dtype).to(tl.float32)
        scaled = silu_times(gate, scaled)
    tl.store(out_ptr + place, scaled.to(out_ptr.dtype.element_ty), mask=inside)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, gate_first: bool) -> Tensor:
    """See `kernels.ops`."""
    x, gate = x.contiguous(), gate if gate.stride(2) == 1 else gate.contiguous()
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    rows = max(ELEMENTS // block, 1)
    gated_rms_norm_kernel[(triton.cdiv(tokens * heads, rows),)](
        out, x, gate, weight, tokens * heads, gate.stride(0), gate.stride(1), eps,
        HEADS=heads, SIZE=size, PER_HEAD=weight.numel() > size, GATE_FIRST=gate_first, ROWS=rows, BLOCK=block,
        num_warps=NUM_WARPS, **dependent(x.device),
    )  # fmt: skip
    return out
