"""Linears of packed 4-bit weights on the CPU: in C++ (`cpu_int4`), by PyTorch, or dequantised first; and blocks of a weight dequantised.

Knows how PyTorch packs, and a weight as it is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagegraph.kernels.linear.fixed_rows import product_of
from pagegraph.kernels.quant import cpu_int4, reference
from pagegraph.kernels.quant.weight import Kind, QuantWeight

INT4_BLOCK = 64  # rows of 4-bit values that PyTorch packs together for AVX-512
INT4_MANY_ROWS = (
    128  # from here on the weight is dequantised first: the packed GEMM takes twice bfloat16's time and more
)


def int4_packed_linear(x: Tensor, packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    """See `kernels.ops`. Of few rows the weight is scaled in float32, of many rounded to x's dtype."""
    if cpu_int4.takes(x.dtype, len(x)):
        return cpu_int4.linear_into(x.contiguous(), packed, pairs, group=group, out=x.new_empty(1, packed.shape[0]))
    if len(x) < INT4_MANY_ROWS:
        return torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
    size, rows = x.shape[1], packed.shape[0]
    weight = _int4_blocks(packed).to(x.dtype).sub_(8).view(-1, size // group, group, INT4_BLOCK)
    by_block = pairs.view(size // group, 1, -1, INT4_BLOCK, 2).permute(4, 2, 0, 1, 3).contiguous()
    weight = weight.mul_(by_block[0]).add_(by_block[1]).view(-1, size, INT4_BLOCK)
    return x @ weight.transpose(0, 1).reshape(size, rows)


def fixed_int4_linear(x: Tensor, packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    """See `kernels.ops`: the weight is scaled in float32, of many rows too."""
    key = ("int4", packed.shape, group, x.dtype)
    return product_of(x, lambda rows: torch._weight_int4pack_mm_for_cpu(rows, packed, group, pairs), key)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] as `torch._convert_weight_to_int4pack_for_cpu` writes it on AVX-512 -> values 0..15 [N, K].

    Elsewhere it packs otherwise, and this gives other values.
    """
    return _int4_blocks(packed).transpose(1, 2).flatten(0, 1)


def _int4_blocks(packed: Tensor) -> Tensor:
    """[N / 64, K, 64]: of each column of a block, 32 bytes hold the first 32 rows in their low halves."""
    blocks = packed.view(-1, 2 * packed.shape[1], INT4_BLOCK // 2)
    return torch.cat([blocks & 15, blocks >> 4], dim=-1)


def dequantized_rows(weight: QuantWeight, expert: int, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of an expert's weight, of a weight [E, N, K] as loaded: bit for bit `reference.dequantize`, rounded to `dtype`."""
    qweight, scale = weight.qweight[expert, rows], reference.scales_of(weight.scale[expert, rows])
    zero = None if weight.zero is None else weight.zero[expert, rows]
    values = _values(qweight, weight.kind)
    group = min(weight.group, values.shape[1])
    if values.shape[1] % group:  # the last group is smaller
        scale = scale.repeat_interleave(group, dim=1)[:, : values.shape[1]]
        zero = None if zero is None else zero.repeat_interleave(group, dim=1)[:, : values.shape[1]]
        group = 1
    grouped = values.unflatten(1, (-1, group))
    grouped.mul_(scale[..., None])
    if zero is not None:
        grouped.add_(zero[..., None])
    return values.to(dtype)


def _values(qweight: Tensor, kind: Kind) -> Tensor:
    """float32 [n, K] of rows as loaded. Small floats are moved into the bits of a float32: far faster than a table or a cast."""
    if kind == "int8":
        return qweight.float()
    if (
        kind == "fp8"
    ):  # sign, four bits of exponent with bias 7, three of mantissa; its NaN, which no weight is, becomes 480
        bits = qweight.view(torch.int8).int()
        return ((bits & 0x7F) << 20 | (bits & 0x80) << 24).view(torch.float32).mul_(2.0**120)
    spans = qweight.unflatten(1, (-1, reference.NIBBLE_SPAN // 2))
    codes = torch.stack([spans & 15, spans >> 4], dim=2).flatten(1)
    if kind == "int4":
        return codes.float().sub_(8)
    bits = codes.int()  # sign, two bits of exponent with bias 1, one of mantissa
    return ((bits & 7) << 22 | (bits & 8) << 28).view(torch.float32).mul_(2.0**126)
