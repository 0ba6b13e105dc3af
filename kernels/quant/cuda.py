"""Quantised linears on CUDA: which kernels a step launches, from its sizes alone. Imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.gpu import gpu_of
from pagegraph.kernels.linear.rms_norm import add_rms_norm
from pagegraph.kernels.linear.silu_mul import silu_mul
from pagegraph.kernels.quant.activations import Norm, exchanged_e4m3_rows
from pagegraph.kernels.quant.gemm_8bit import gemm_8bit
from pagegraph.kernels.quant.gemm_16bit import dequantize_repacked, gemm_16bit
from pagegraph.kernels.quant.gemv import ROWS, quant_gemv
from pagegraph.kernels.quant.tiles import QUANTIZES_X, Choice, choice_of, takes_8bit_activations
from pagegraph.kernels.quant.weight import QuantWeight, two_weights


def repacked_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    out_size: int,
    quantize_x: bool,
    gated: bool = False,
) -> Tensor:
    """See `kernels.ops`."""
    rows, weight = _rows(x), QuantWeight(qweight, scale, zero, bias, group, out_size)
    choice = _choice(len(rows), rows.shape[1], x.dtype, weight, quantize_x)
    return repacked_linear_by(choice, rows, weight, gated).view(*x.shape[:-1], -1)


def norm_repacked_linear(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    quantize_x: bool,
    *weights: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops`. Where rows are quantised for a GEMM, one kernel does that and what is ahead of it."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    ahead = Norm(norm, eps, residual.reshape(rows.shape).contiguous(), torch.empty_like(rows))
    weight, behind = two_weights(weights)
    choice = _choice(len(rows), rows.shape[1], x.dtype, weight, quantize_x)
    if behind is None:
        out = repacked_linear_by(choice, rows, weight, norm=ahead)
    else:
        later = _choice(len(rows), weight.out_size // 2, x.dtype, behind, quantize_x)
        # The gate is computed where its result is quantised; else it may be computed in the first kernel.
        apart = later.way in QUANTIZES_X
        inner = repacked_linear_by(choice, rows, weight, gated=not apart, norm=ahead)
        out = repacked_linear_by(later, inner, behind, gated_rows=apart)
    return ahead.total.view(x.shape), out.view(*x.shape[:-1], -1)


def _choice(rows: int, size: int, dtype: torch.dtype, weight: QuantWeight, quantize_x: bool) -> Choice:
    """How x [rows, size] is multiplied with a weight."""
    quantize_x = quantize_x and takes_8bit_activations(weight, size, dtype)
    return choice_of(
        weight.kind, rows, weight.out_size, size, quantize_x, dtype.itemsize == 2, gpu_of(weight.qweight.device)
    )


def repacked_linear_by(
    choice: Choice,
    rows: Tensor,
    weight: QuantWeight,
    gated: bool = False,
    norm: Norm | None = None,
    gated_rows: bool = False,
) -> Tensor:
    """rows [T, K] -> [T, out_size], gated half of that, by the given way; `by_gemm_8bit` and `scaled` round rows to 8 bits too.

    norm: what is done to rows first; gated_rows, of ways that quantise: they are [T, 2 * K], and silu(first half) * second half is multiplied.
    """
    if choice.way not in QUANTIZES_X and norm is not None:
        _, rows = add_rms_norm(rows, norm.residual, norm.weight, norm.eps, norm.total)
    if choice.way == "gemv":
        assert choice.tile is not None
        # Gate and up are one program's.
        tile = choice.tile._replace(parts=max(2, choice.tile.parts)) if gated else choice.tile
        within = gated and weight.out_size % (ROWS.value * tile.parts) == 0
        out = quant_gemv(rows, weight, within, tile)
        return silu_mul(out) if gated and not within else out
    if choice.way == "gemm_16bit":
        out = gemm_16bit(rows, weight, choice.tile)
    elif choice.way == "gemm_8bit":
        out = gemm_8bit(rows, weight, choice.tile, norm, gated_rows)
    elif choice.way == "dequantize":
        out = functional.linear(rows, dequantize_repacked(weight, rows.shape[1], rows.dtype), weight.bias)
    else:
        x_q, x_scale = exchanged_e4m3_rows(rows, norm, gated_rows)
        # Fast: the tensor cores add up a whole row, with fewer bits than float32 has.
        out = torch._scaled_mm(
            x_q,
            weight.qweight.t(),
            scale_a=x_scale,
            scale_b=weight.scale.t(),
            bias=weight.bias,
            out_dtype=rows.dtype,
            use_fast_accum=True,
        )
    return silu_mul(out) if gated else out


def _rows(x: Tensor) -> Tensor:
    """x [..., K] -> [T, K], rows dense."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
