"""Random quantised weights, for the tests of the products that take them."""

from __future__ import annotations

import torch

from pagegraph.kernels.quant import reference


def random_weight(
    kind: str, rows: int, size: int, group: int, has_zero: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rows + size)
    groups = -(-size // group)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randn(rows, groups, generator=generator) if has_zero else None
    if kind == "fp8":
        return (torch.randn(rows, size, generator=generator) * 30).to(torch.float8_e4m3fn), scale, zero
    limit = 8 if kind == "int4" else 128
    qweight = torch.randint(-limit, limit, (rows, size), dtype=torch.int8, generator=generator)
    return reference.pack_nibbles(qweight) if kind == "int4" else qweight, scale, zero


def multiplied(
    qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [N, K] float32 that rows are multiplied by: with a zero, and in groups, rounded to dtype."""
    weight = reference.dequantize(qweight, scale, zero, group)
    exact = zero is None and scale.shape[1] == 1
    return weight if exact else weight.to(dtype).float()


def repacked(
    qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As the threads of a product want it."""
    if qweight.dtype == torch.float8_e4m3fn:
        return reference.exchanged_columns(qweight), scale, zero
    bits = 4 if qweight.dtype == torch.uint8 else 8
    qweight = reference.repack(reference.unpack_nibbles(qweight) if bits == 4 else qweight, bits)
    return qweight, *(None if one is None else reference.repack_scales(one, group, size) for one in (scale, zero))
