"""Random weights of codes, for the tests of the products that take them."""

from __future__ import annotations

import torch

from pagegraph.kernels.quant import reference


def random_weight(
    kind: str, rows: int, size: int, group: int, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rows + size)
    groups = -(-size // group)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    shift = torch.randn(rows, groups, generator=generator) if shifted else None
    if kind == "fp8":
        return (torch.randn(rows, size, generator=generator) * 30).to(torch.float8_e4m3fn), scale, shift
    limit = 8 if kind == "int4" else 128
    codes = torch.randint(-limit, limit, (rows, size), dtype=torch.int8, generator=generator)
    return reference.pack_nibbles(codes) if kind == "int4" else codes, scale, shift


def multiplied(
    codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [N, K] float32 that rows are multiplied by: with a shift, and in groups, rounded to dtype."""
    weight = reference.dequantize(codes, scale, shift, group)
    exact = shift is None and scale.shape[1] == 1
    return weight if exact else weight.to(dtype).float()


def laid(
    codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, group: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As the threads of a product want it."""
    if codes.dtype == torch.float8_e4m3fn:
        return reference.exchanged_columns(codes), scale, shift
    bits = 4 if codes.dtype == torch.uint8 else 8
    codes = reference.fragments(reference.unpack_nibbles(codes) if bits == 4 else codes, bits)
    return codes, *(None if one is None else reference.fragment_pairs(one, group, size) for one in (scale, shift))
