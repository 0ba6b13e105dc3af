"""Quantised weights and activations in plain PyTorch: how they are rounded, packed and multiplied.

The specification and the oracle of the tests. Packing, repacking and int8x2 are also what runs when a model
is built (`compiler/quantization`). Knows no device and no checkpoint.
"""

from __future__ import annotations

import torch

from pagegraph.kernels.dtypes import FP8_MAX, INT8_MAX
from pagegraph.kernels.linear.reference import add_rms_norm, silu_mul
from pagegraph.kernels.quant.weight import E8M0, two_weights

INT8X2_STEPS = 2 * INT8_MAX  # what a rounding to int8 leaves is at most half: this many steps fill the next int8
# Values of the codes of e2m1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NIBBLE_SPAN = 32  # columns that `pack_nibbles` keeps together
REPACK_BLOCK = (
    64  # rows and columns of a weight that `repack` lays together, as many rows as Hopper's instruction takes
)
ACTIVATION_GROUP = 128  # columns of a row of x that share a scale, where both sides of a GEMM are 8 bits


def pack_nibbles(qweight: torch.Tensor) -> torch.Tensor:
    """int8 qweight [.., K] in -8..7, K a multiple of 32 -> uint8 [.., K / 2].

    Of every 32 columns the first 16 are the low halves of 16 bytes, the last 16 the high halves, each plus 8: a kernel
    gets two runs of neighbouring columns from one load.
    """
    return pack_codes((qweight + 8).to(torch.uint8))


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [.., K] in 0..15 -> uint8 [.., K / 2], as `pack_nibbles`."""
    low, high = codes.unflatten(-1, (-1, 2, NIBBLE_SPAN // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [.., K / 2] -> int8 [.., K]."""
    return unpack_codes(packed).to(torch.int8) - 8


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_codes`: uint8 [.., K / 2] -> uint8 [.., K]."""
    spans = packed.unflatten(-1, (-1, NIBBLE_SPAN // 2))
    return torch.stack([spans & 15, spans >> 4], dim=-2).flatten(-3)


def repack(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 qweight [N, K], in -8..7 at 4 bits -> [N / 64, K / 64, 128, 16] uint8, at 8 bits [.., 256, 16] int8: operands of the tensor cores.

    Blocks of 64 rows and columns, filled up with zeros, lie as threads hold the operand A of wgmma m64k16 (PTX ISA, "Register
    Fragments for wgmma"): thread 32 * w + 4 * q + r has rows 16 * w + q + 8 * h, and of every 16 columns those of 8 * c + 2 * r + p,
    for h, c, p of 0 and 1. At 4 bits 16 columns are a word of a thread: bits from 4 * (4 * p + 2 * h + c) on are the value plus 8.
    At 8 bits 8 columns are a word, byte 2 * p + h a value, and the last 32 columns of a block follow the first. `kernels.quant.dequant` reads them so.
    """
    qweight = torch.nn.functional.pad(qweight, (0, -qweight.shape[1] % REPACK_BLOCK, 0, -len(qweight) % REPACK_BLOCK))
    row_blocks, blocks = len(qweight) // REPACK_BLOCK, qweight.shape[1] // REPACK_BLOCK
    if bits == 8:  # block, w, h, q, block, half, step, c, r, p
        parts = qweight.view(row_blocks, 4, 2, 8, blocks, 2, 2, 2, 4, 2).permute(0, 4, 5, 1, 3, 8, 6, 7, 9, 2)
        return parts.reshape(row_blocks, blocks, 256, 16)
    parts = (
        (qweight + 8).view(row_blocks, 4, 2, 8, blocks, 4, 2, 4, 2).permute(0, 4, 1, 3, 7, 5, 8, 2, 6)
    )  # the last are halves c
    low, high = parts.to(torch.uint8).unbind(-1)
    return (low | high << 4).reshape(row_blocks, blocks, 128, 16)


def from_repacked(repacked: torch.Tensor, rows: int, size: int) -> torch.Tensor:
    """The inverse of `repack`: int8 [rows, size]."""
    row_blocks, blocks = repacked.shape[:2]
    if repacked.dtype == torch.int8:
        parts = repacked.view(row_blocks, blocks, 2, 4, 8, 4, 2, 2, 2, 2).permute(0, 3, 9, 4, 1, 2, 6, 7, 5, 8)
    else:
        parts = torch.stack([repacked & 15, repacked >> 4], dim=-1).to(torch.int8) - 8
        parts = parts.view(row_blocks, blocks, 4, 8, 4, 4, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 8, 4, 6)
    return parts.reshape(row_blocks * REPACK_BLOCK, -1)[:rows, :size].contiguous()


def exchanged_columns(values: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [N, K'], K filled up to a multiple of 64 with zeros: of every 64 columns first those of thread r = 0 of `repack`.

    So 16 neighbours are the part of a row that a thread's operand has: column 16 * step + 8 * c + 2 * r + p is at 16 * r + 4 * step + 2 * c + p.
    """
    padded = values.new_zeros(len(values), -(-values.shape[1] // REPACK_BLOCK) * REPACK_BLOCK)
    padded[:, : values.shape[1]] = values
    return padded.view(len(values), -1, 4, 2, 4, 2).permute(0, 1, 4, 2, 3, 5).reshape(padded.shape)


def restored_columns(exchanged: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `exchanged_columns`: [N, size]."""
    return exchanged.view(len(exchanged), -1, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(exchanged.shape)[:, :size]


def repack_scales(scale: torch.Tensor, group: int, size: int) -> torch.Tensor:
    """Scales or zeros [N, groups] of `group` columns each -> [N / 64, blocks, 32, 2 * n] beside `repack`, n groups to a block.

    Or a group is of several blocks, or of all. At 8 * w + q are n pairs, of row 16 * w + q and of that 8 rows on.
    """
    n = 1 if group >= size else max(1, REPACK_BLOCK // group)
    scale = torch.nn.functional.pad(scale, (0, -scale.shape[1] % n, 0, -len(scale) % REPACK_BLOCK))
    parts = scale.view(len(scale) // REPACK_BLOCK, 4, 2, 8, scale.shape[1] // n, n).permute(0, 4, 1, 3, 5, 2)
    return parts.reshape(len(scale) // REPACK_BLOCK, scale.shape[1] // n, 32, 2 * n)


def from_repacked_scales(pairs: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `repack_scales`: [rows, groups], of as many columns as it holds scales for."""
    parts = pairs.view(*pairs.shape[:2], 4, 8, pairs.shape[3] // 2, 2).permute(0, 2, 5, 3, 1, 4)
    return parts.reshape(len(pairs) * REPACK_BLOCK, -1)[:rows, :groups]


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> x_q of `dtype` (int8 or float8_e4m3fn) [..., K], float32 scale [..., 1]: x is about x_q * scale.

    Symmetric: the largest magnitude of a row becomes 127, or 448, the largest of e4m3 (Micikevicius et al. 2022).
    """
    wide = x.float()
    largest = INT8_MAX if dtype == torch.int8 else FP8_MAX
    scale = (wide.abs().amax(dim=-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    x_q = (wide / scale).clamp(-largest, largest)
    return (x_q.round() if dtype == torch.int8 else x_q).to(dtype), scale


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> int8 x_q [T, K'], float32 scale [K' / 128, T]; K' is K filled up to a multiple of 128 with zeros.

    Every 128 columns have a scale of their own. Of each 16 columns, column 8 * c + 2 * r + p is at 4 * r + 2 * c + p: so four
    neighbours are the four bytes of a register of the tensor cores whose other operand is made of `repack`.
    """
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % ACTIVATION_GROUP)).unflatten(1, (-1, ACTIVATION_GROUP))
    x_q, scale = quantize_rows(wide, torch.int8)
    return _as_bytes_of_registers(x_q.flatten(1)), scale[..., 0].t().contiguous()


def e4m3_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] -> float8_e4m3fn x_q [T, K'], float32 scale [T], the sums of every 128 x_q float32 [K' / 128, T]; columns as `int8_rows`."""
    x_q, scale = quantize_rows(
        torch.nn.functional.pad(x.float(), (0, -x.shape[1] % ACTIVATION_GROUP)), torch.float8_e4m3fn
    )
    sums = x_q.float().unflatten(1, (-1, ACTIVATION_GROUP)).sum(2)
    return _as_bytes_of_registers(x_q), scale[:, 0], sums.t().contiguous()


def _as_bytes_of_registers(x_q: torch.Tensor) -> torch.Tensor:
    """[T, K] with columns in the order that `int8_rows` tells of."""
    return x_q.view(len(x_q), -1, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(x_q.shape)


def decoded_rows(x_q: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """What `int8_rows` stands for, or `e4m3_rows` with its scale as [1, T]: float32 [T, size]."""
    plain = x_q.view(len(x_q), -1, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(len(x_q), -1, ACTIVATION_GROUP)
    return (plain.float() * scale.t()[:, :, None]).flatten(1)[:, :size]


def int8x2(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] -> int8 high and low [T, K], float32 scale [T, 1]: x is about (high + low / 254) * scale."""
    high, scale = quantize_rows(x, torch.int8)
    rest = x.float() / scale - high
    return high, (rest * INT8X2_STEPS).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def quantize_groups(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] -> int8 qweight [N, K] in -8..7, float32 scale and zero [N, K / group]: 16 even steps from least to most."""
    wide = weight.float().unflatten(1, (-1, group))
    low, high = wide.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    qweight = ((wide - low) / scale).round().clamp(0, 15) - 8
    return qweight.to(torch.int8).flatten(1), scale[..., 0], (low + 8 * scale)[..., 0]


def dequantize(qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int) -> torch.Tensor:
    """Float32 weight [.., N, K]: qweight * scale + zero of the column's group; `kernels.quant.weight` has the shapes."""
    if scale.dtype == E8M0:
        qweight = torch.tensor(E2M1, device=qweight.device)[unpack_codes(qweight).int()]
    elif qweight.dtype == torch.uint8:
        qweight = unpack_nibbles(qweight)
    size = qweight.shape[-1]
    weight = qweight.float() * scales_of(scale).repeat_interleave(group, dim=-1)[..., :size]
    return weight if zero is None else weight + zero.float().repeat_interleave(group, dim=-1)[..., :size]


def scales_of(scale: torch.Tensor) -> torch.Tensor:
    """A weight's scales in float32."""
    return (
        torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
        if scale.dtype == E8M0
        else scale.float()
    )


def quant_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """See `kernels.ops`: the product with the dequantised weight, rounded to x's dtype."""
    return torch.nn.functional.linear(x, dequantize(qweight, scale, zero, group).to(x.dtype), bias)


def repacked_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    out_size: int,
    quantize_x: bool,
    gated: bool = False,
) -> torch.Tensor:
    """See `kernels.ops`: the product with the dequantised weight, rounded to x's dtype."""
    size = x.shape[-1]
    if qweight.dtype == torch.float8_e4m3fn:
        qweight = restored_columns(qweight, size)
    else:
        scale, zero = (
            None if one is None else from_repacked_scales(one, out_size, -(-size // group)) for one in (scale, zero)
        )
        qweight = from_repacked(qweight, out_size, size)
    product = quant_linear(x, qweight, scale, zero, bias, group)
    return silu_mul(product) if gated else product


def norm_repacked_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    quantize_x: bool,
    *weights: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.ops`."""
    total, normed = add_rms_norm(x, residual, norm, eps)
    weight, behind = two_weights(weights)
    out = repacked_linear(normed, *weight[:6], quantize_x, behind is not None)
    return total, out if behind is None else repacked_linear(out, *behind[:6], quantize_x)
