"""Quantised linears in the form that CUDA multiplies, against the form they are loaded in; the ops' reference on the CPU."""

from __future__ import annotations

import pytest
import torch

import kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from compiler.passes.quant_linears import Fragments, QuantLinear
from compiler.quant_formats import Quantized
from kernels import reference


def linear(bits: int, group: int, size: int, shifted: bool, columns: bool) -> QuantLinear:
    generator = torch.Generator().manual_seed(size)
    limit, groups = 1 << bits - 1, -(-size // group)
    codes = torch.randint(-limit, limit, (100, size), dtype=torch.int8, generator=generator)
    scale = (torch.rand(100, groups, generator=generator) + 0.1).bfloat16().float()
    shift = torch.randn(100, groups, generator=generator).bfloat16().float() if shifted else None
    order = torch.randperm(size, generator=generator) if columns else None
    packed = reference.pack_nibbles(codes) if bits == 4 else codes
    return QuantLinear(Quantized(packed, scale, shift, group, order), torch.randn(100, generator=generator).bfloat16(), torch.bfloat16)


@pytest.mark.parametrize("bits, group, size", [(4, 32, 160), (4, 96, 192), (4, 128, 256), (4, 160, 160), (8, 16, 96), (8, 48, 144), (8, 200, 200)])
@pytest.mark.parametrize("shifted, columns", [(False, False), (True, False), (True, True)])
def test_laid_out_as_operands_they_compute_the_same(bits: int, group: int, size: int, shifted: bool, columns: bool) -> None:
    loaded = linear(bits, group, size, shifted, columns)
    states = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(Fragments(loaded)(states), loaded(states))
