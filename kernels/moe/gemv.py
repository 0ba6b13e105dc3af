"""Triton: experts of a few tokens without tensor cores, two kernels, each one pass over the weights of the chosen.

The first multiplies for each pair of a token and its choice, rows of gate and up in turn, and applies the gate before it stores.
The second adds up a token's choices, weighted, before it adds up columns: nothing is left to merge. Pairs are the grid's inner
axis, so that an expert which two tokens chose is read beside itself. Padding rows ask for no weight. No weight is asked for ahead
of the wait: which, is what kernels before this one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.moe.activation import activate, gate_times
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.tiles import GemvTile
from pagegraph.kernels.pdl import dependent, wait


@triton.jit
def choice_of(chosen_ptr, live_ptr, pair, CHOICES: tl.constexpr, EXPERTS: tl.constexpr, HAS_LIVE: tl.constexpr):
    """(expert, whether it is one): of padding it is none."""
    expert = tl.load(chosen_ptr + pair).to(tl.int32)
    valid = (expert >= 0) & (expert < EXPERTS)
    if HAS_LIVE:
        valid = valid & (pair // CHOICES < tl.load(live_ptr))
    return expert, valid


@triton.jit
def experts_up_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    chosen_ptr,
    live_ptr,
    x_stride,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,  # of the output
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    pair = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    lane = tl.arange(0, BLOCK_K)
    COLUMNS: tl.constexpr = 2 * N if GATED else N
    if GATED:
        both = tl.arange(0, 2 * BLOCK_N)
        inside = first + both // 2 < N
        column = 2 * first + both if INTERLEAVED else first + both // 2 + both % 2 * N
    else:
        column = first + tl.arange(0, BLOCK_N)
        inside = column < N
    if TRANSPOSED:
        offsets = column[:, None] + lane[None, :] * COLUMNS
    else:
        offsets = column[:, None] * K + lane[None, :]
    STEP: tl.constexpr = COLUMNS if TRANSPOSED else 1
    if PDL:
        wait()
    expert, valid = choice_of(chosen_ptr, live_ptr, pair, CHOICES, EXPERTS, HAS_LIVE)
    if valid:
        weight_at = weight_ptr + expert.to(tl.int64) * (K * COLUMNS) + offsets
        x_at = x_ptr + (pair // CHOICES).to(tl.int64) * x_stride + lane
        total = tl.zeros(offsets.shape, tl.float32)
        for k in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                weight = tl.load(weight_at + k * STEP, mask=inside[:, None], other=0.0)
                x = tl.load(x_at + k)
            else:
                within = lane < K - k
                weight = tl.load(weight_at + k * STEP, mask=inside[:, None] & within[None, :], other=0.0)
                x = tl.load(x_at + k, mask=within, other=0.0)
            total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        sums = tl.sum(total, 1)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + expert * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        sums = sums.to(dtype).to(tl.float32)  # as a product of its own would be
        if GATED:
            gate, up = tl.split(sums.reshape(BLOCK_N, 2))
            sums = gate_times(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
        else:
            sums = activate(sums, ACTIVATION, ALPHA)
        n = first + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + pair.to(tl.int64) * N + n, sums.to(dtype), mask=n < N)


@triton.jit
def experts_down_kernel(
    out_ptr,
    inner_ptr,
    weight_ptr,
    bias_ptr,
    chosen_ptr,
    scale_ptr,  # routing weights
    residual_ptr,
    live_ptr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,  # choices whose weights are asked for at once
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    lane = tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        offsets = n[:, None] + lane[None, :] * N
    else:
        offsets = n[:, None] * K + lane[None, :]
    STEP: tl.constexpr = N if TRANSPOSED else 1
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    biases = tl.zeros([BLOCK_N], tl.float32)
    if PDL:
        wait()
    out_at = token.to(tl.int64) * N + n
    if HAS_RESIDUAL:  # asked for long before it is added
        residual = tl.load(residual_ptr + out_at, mask=inside, other=0.0).to(tl.float32)
    for begin in range(0, CHOICES, AHEAD):
        weights_at = ()
        inner_at = ()
        scales = ()
        valids = ()
        for ahead in tl.static_range(AHEAD):
            choice = begin + ahead
            pair = token * CHOICES + tl.minimum(choice, CHOICES - 1)
            expert, valid = choice_of(chosen_ptr, live_ptr, pair, CHOICES, EXPERTS, HAS_LIVE)
            valid = valid & (choice < CHOICES)
            expert = tl.where(valid, expert, 0)
            scale = tl.load(scale_ptr + pair, mask=valid, other=0.0).to(tl.float32)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + expert * N + n, mask=inside & valid, other=0.0)
                biases += scale * bias.to(tl.float32)
            weights_at = weights_at + (weight_ptr + expert.to(tl.int64) * (K * N) + offsets,)
            inner_at = inner_at + (inner_ptr + pair.to(tl.int64) * K + lane,)
            scales = scales + (scale,)
            valids = valids + (valid,)
        for k in range(0, K, BLOCK_K):
            within = lane < K - k
            weights = ()
            rows = ()
            for ahead in tl.static_range(AHEAD):  # of all of them before the first is multiplied
                if K % BLOCK_K == 0:
                    mask = inside[:, None] & valids[ahead]
                    row = tl.load(inner_at[ahead] + k, mask=(lane >= 0) & valids[ahead], other=0.0)
                else:
                    mask = inside[:, None] & within[None, :] & valids[ahead]
                    row = tl.load(inner_at[ahead] + k, mask=within & valids[ahead], other=0.0)
                weights = weights + (tl.load(weights_at[ahead] + k * STEP, mask=mask, other=0.0),)
                rows = rows + (row,)
            for ahead in tl.static_range(AHEAD):
                total += weights[ahead].to(tl.float32) * (rows[ahead].to(tl.float32) * scales[ahead])[None, :]
    sums = tl.sum(total, 1) + biases
    dtype = out_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        sums = sums.to(dtype).to(tl.float32) + residual  # as an addition of its own would
    tl.store(out_ptr + out_at, sums.to(dtype), mask=inside)


def experts_up(
    x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor | None, form: Form, tile: GemvTile
) -> Tensor:
    """What the second product takes of each pair: [T * k, I]; rows of no expert are not written."""
    experts = len(weight)
    columns, size = (weight.shape[2], weight.shape[1]) if form.transposed else weight.shape[1:]
    inner = columns // 2 if form.gated else columns
    out = torch.empty(chosen.numel(), inner, dtype=x.dtype, device=x.device)
    experts_up_kernel[len(out), -(-inner // tile.block_n)](
        out,
        x,
        weight,
        bias if bias is not None else weight,
        chosen,
        live if live is not None else chosen,
        x.stride(0),
        CHOICES=chosen.shape[1],
        EXPERTS=experts,
        N=inner,
        K=size,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **form.constants,
        HAS_BIAS=bias is not None,
        HAS_LIVE=live is not None,
        num_warps=tile.num_warps,
        **dependent(x.device),
    )
    return out


def experts_down(
    inner: Tensor,
    chosen: Tensor,
    weights: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: Tensor | None,
    transposed: bool,
    tile: GemvTile,
    residual: Tensor | None = None,
) -> Tensor:
    """The weighted sum over a token's choices of inner [T * k, I] times their weight, and residual [T, H]: [T, H]."""
    size, hidden = weight.shape[1:] if transposed else weight.shape[:0:-1]
    out = torch.empty(len(chosen), hidden, dtype=inner.dtype, device=inner.device)
    experts_down_kernel[len(chosen), -(-hidden // tile.block_n)](
        out,
        inner,
        weight,
        bias if bias is not None else weight,
        chosen,
        weights,
        residual if residual is not None else out,
        live if live is not None else chosen,
        CHOICES=chosen.shape[1],
        EXPERTS=len(weight),
        N=hidden,
        K=size,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        AHEAD=tile.ahead,
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_LIVE=live is not None,
        num_warps=tile.num_warps,
        **dependent(inner.device),
    )
    return out
