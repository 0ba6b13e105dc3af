"""The ops on CUDA: which kernels a step launches, from its sizes alone.

No value is read back to the host, so the launches can be captured in a CUDA graph and replayed with other
metadata at the same addresses. Imports Triton; `kernels.ops` imports this module at the first CUDA call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.attention.decode import attend_rows
from pagegraph.kernels.attention.kv_cache import write_kv
from pagegraph.kernels.attention.prefill import attend_ragged
from pagegraph.kernels.attention.rope_kv_cache import rope_write
from pagegraph.kernels.linear.gemv import row_linear
from pagegraph.kernels.linear.rms_norm import add_rms_norm
from pagegraph.kernels.linear.silu_mul import silu_mul
from pagegraph.kernels.linear.skinny_gemm import skinny_linear
from pagegraph.kernels.linear.tiles import RowTile, row_tile_of, tile_of
from pagegraph.kernels.quant.activations import Norm, exchanged_e4m3_rows
from pagegraph.kernels.quant.gemm_8bit import coded_linear
from pagegraph.kernels.quant.gemm_16bit import fragment_dequantize
from pagegraph.kernels.quant.gemm_16bit import fragment_linear as tiled_fragment_linear
from pagegraph.kernels.quant.gemv import ROWS, fragment_rows
from pagegraph.kernels.quant.tiles import ROUNDING, Choice, QuantWeight, choice_of, takes_8_bits


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> Tensor:
    """See `kernels.ops` for shapes."""
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    write_kv(key, value, key_cache, value_cache, slots)
    return _attend(
        query, key_cache, value_cache, block_tables, query_start, seq_lens, sinks, scale, window, softcap, chunk
    )


def rope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *metadata: Tensor | float | int | None,
) -> Tensor:
    """See `kernels.ops`; queries and keys are rotated, and keys and values stored, by one kernel."""
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    rotated = rope_write(query, key, value, cos, sin, query_norm, key_norm, eps, key_cache, value_cache, slots)
    return _attend(rotated, key_cache, value_cache, *metadata)


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, *rest: Tensor | float | int | None
) -> Tensor:
    """Attention over pages that hold the step's own keys and values already.

    A bucket with a row a sequence (T <= S) is all the decode kernel's, whatever its real rows are. A larger one
    runs both kernels; each leaves the other's sequences alone.
    """
    tokens, num_seqs = query.shape[0], block_tables.shape[0]
    shape = (tokens, query.shape[1], value_cache.shape[3])
    metadata = (key_cache, value_cache, block_tables, *rest)
    if tokens <= num_seqs:
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
        attend_rows(out, query, *metadata, by_token=True)
    else:
        out = torch.zeros(shape, dtype=query.dtype, device=query.device)  # padding rows are no kernel's
        attend_rows(out, query, *metadata, by_token=False)
        attend_ragged(out, query, *metadata)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Tensor:
    """See `kernels.ops`. gated: silu(first half) * second half of the product."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.element_size() == 2 and weight.is_contiguous() and rows.stride(1) == 1:
        count, shape = len(rows), weight.shape
        if row_tile := row_tile_of(count, *shape, gated=gated):
            return row_linear(rows, weight, bias, row_tile, gated=gated).view(*x.shape[:-1], -1)
        if tile := tile_of(count, *shape):
            return skinny_linear(rows, weight, bias, tile, gated=gated).view(*x.shape[:-1], -1)
    product = functional.linear(x, weight, bias)
    return silu_mul(product) if gated else product


def fragment_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    out_size: int,
    rounds: bool,
    gated: bool = False,
) -> Tensor:
    """See `kernels.ops`."""
    rows, weight = _rows(x), QuantWeight(codes, scale, shift, bias, group, out_size)
    choice = _choice(len(rows), rows.shape[1], x.dtype, weight, rounds)
    return fragment_linear_by(choice, rows, weight, gated).view(*x.shape[:-1], -1)


def norm_fragment_linear(
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    out_size: int,
    rounds: bool,
    *second: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops`. Where rows are rounded for a product, one kernel does that and what is ahead of it."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    ahead = Norm(norm, eps, residual.reshape(rows.shape).contiguous(), torch.empty_like(rows))
    weight, behind = QuantWeight(codes, scale, shift, bias, group, out_size), QuantWeight(*second)
    choice = _choice(len(rows), rows.shape[1], x.dtype, weight, rounds)
    if behind.codes is None:
        out = fragment_linear_by(choice, rows, weight, norm=ahead)
    else:
        later = _choice(len(rows), out_size // 2, x.dtype, behind, rounds)
        apart = (
            later.way in ROUNDING
        )  # then the gate is done as its result is rounded; else it may be done in the first product's kernel
        inner = fragment_linear_by(choice, rows, weight, gated=not apart, norm=ahead)
        out = fragment_linear_by(later, inner, behind, gated_rows=apart)
    return ahead.total.view(x.shape), out.view(*x.shape[:-1], -1)


def _choice(rows: int, size: int, dtype: torch.dtype, weight: QuantWeight, rounds: bool) -> Choice:
    """How x [rows, size] is multiplied with a weight."""
    rounds = rounds and takes_8_bits(
        weight.kind, dtype, weight.out_size, size, weight.group, weight.shift is not None, weight.codes.device
    )
    return choice_of(weight.kind, rows, weight.out_size, size, rounds, dtype.itemsize == 2)


def fragment_linear_by(
    choice: Choice,
    rows: Tensor,
    weight: QuantWeight,
    gated: bool = False,
    norm: Norm | None = None,
    gated_rows: bool = False,
) -> Tensor:
    """rows [T, K] -> [T, out_size], gated half of that, by the given way; `coded` and `scaled` round rows to 8 bits too.

    norm: what is done to rows first; gated_rows, of ways that round: they are [T, 2 * K], and silu(first half) * second half is multiplied.
    """
    if choice.way not in ROUNDING and norm is not None:
        _, rows = add_rms_norm(rows, norm.residual, norm.weight, norm.eps, norm.total)
    if choice.way == "rows":
        tile = (
            choice.tile._replace(parts=max(2, choice.tile.parts)) if gated else choice.tile
        )  # gate and up are one program's
        within = gated and weight.out_size % (ROWS.value * tile.parts) == 0
        out = fragment_rows(rows, weight, within, tile)
        return silu_mul(out) if gated and not within else out
    if choice.way == "tile":
        out = tiled_fragment_linear(rows, weight, choice.tile)
    elif choice.way == "coded":
        out = coded_linear(rows, weight, choice.tile, norm, gated_rows)
    elif choice.way == "plain":
        out = functional.linear(rows, fragment_dequantize(weight, rows.shape[1], rows.dtype), weight.bias)
    else:
        x_codes, x_scale = exchanged_e4m3_rows(rows, norm, gated_rows)
        # Fast: the matrix unit adds up a whole row, with fewer bits than float32 has.
        out = torch._scaled_mm(
            x_codes,
            weight.codes.t(),
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


def linear_norm_linear(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    second: Tensor,
    second_bias: Tensor | None,
    gated: bool,
    query_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops`. For a few rows two kernels, else a kernel for each of its parts."""
    tiles = _row_tiles(x, first, residual, second, gated)
    if tiles is None:
        total, normed = add_rms_norm(residual, linear(x, first, first_bias), norm, eps)
        return total, linear(normed, second, second_bias, gated=gated)
    rows = x.reshape(-1, x.shape[-1])
    total = row_linear(
        rows, first, first_bias, tiles[0], residual=residual.reshape(len(rows), -1), query_start=query_start
    )
    out = row_linear(total, second, second_bias, tiles[1], norm=norm, eps=eps, gated=gated, query_start=query_start)
    return total.view(residual.shape), out.view(*x.shape[:-1], -1)


def _row_tiles(
    x: Tensor, first: Tensor, residual: Tensor, second: Tensor, gated: bool
) -> tuple[RowTile, RowTile] | None:
    """How both products are cut where all they read suits `row_linear`."""
    dense = all(one.is_contiguous() for one in (x, first, residual, second))
    if not dense or first.element_size() != 2 or second.element_size() != 2:
        return None
    rows = x.numel() // x.shape[-1]
    tiles = row_tile_of(rows, *first.shape), row_tile_of(rows, *second.shape, gated=gated)
    return tiles if all(tiles) else None


def _dense_rows(rows: Tensor) -> Tensor:
    """Heads may be strided (a transpose, a slice of a merged projection); elements of a head may not."""
    return rows if rows.stride(2) == 1 else rows.contiguous()
