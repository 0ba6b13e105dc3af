"""Quantised linears in the form that CUDA multiplies, against the form they are loaded in; the ops' reference on the CPU."""

from __future__ import annotations

import pytest
import torch

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.quantization.layouts import Int8Dynamic, RepackedLinear, repacked_group
from pagegraph.compiler.quantization.linear import QuantLinear
from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.weight import QuantWeight


def linear(kind: str, group: int, size: int, has_zero: bool = False, act_order: bool = False) -> QuantLinear:
    generator = torch.Generator().manual_seed(size)
    limit, groups = 8 if kind == "int4" else 128, -(-size // group)
    qweight = torch.randint(-limit, limit, (100, size), dtype=torch.int8, generator=generator)
    scale = (torch.rand(100, groups, generator=generator) + 0.1).bfloat16().float()
    zero = torch.randn(100, groups, generator=generator).bfloat16().float() if has_zero else None
    order = torch.randperm(size, generator=generator) if act_order else None
    bias = torch.randn(100, generator=generator).bfloat16()
    packed = (
        reference.pack_nibbles(qweight)
        if kind == "int4"
        else qweight
        if kind == "int8"
        else qweight.to(torch.float8_e4m3fn)
    )
    return QuantLinear(QuantWeight(packed, scale, zero, bias, group, 100, order), torch.bfloat16)


@pytest.mark.parametrize(
    "kind, group, size, has_zero, act_order",
    [
        *(
            ("int4", *sizes, has_zero, act_order)
            for sizes in ((32, 160), (96, 192), (128, 256), (160, 160))
            for has_zero, act_order in ((False, False), (True, True))
        ),
        *(
            ("int8", *sizes, has_zero, act_order)
            for sizes in ((16, 96), (48, 144), (200, 200))
            for has_zero, act_order in ((False, False), (True, True))
        ),
        *(("fp8", *sizes, False, False) for sizes in ((200, 200), (128, 320), (192, 384))),
    ],
)
def test_laid_out_as_operands_they_compute_the_same(
    kind: str, group: int, size: int, has_zero: bool, act_order: bool
) -> None:
    loaded = linear(kind, group, size, has_zero, act_order)
    states = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(RepackedLinear(loaded)(states), loaded(states))


@pytest.mark.parametrize(
    "kind, group, size, held",
    [
        ("int4", 128, 512, 128),
        ("int4", 32, 512, 32),
        ("int4", 96, 512, 32),
        ("int4", 160, 160, 160),
        ("int8", 16, 64, 16),
        ("int8", 48, 96, 16),
        ("int8", 8, 64, 0),
        ("fp8", 128, 512, 128),
        ("fp8", 32, 512, 0),
    ],
)
def test_groups_that_blocks_are_made_of(kind: str, group: int, size: int, held: int) -> None:
    assert repacked_group(linear(kind, group, size).quantized) == held


def test_a_step_beside_a_compilation_computes_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says of every thread that it compiles while one does."""
    product, state = (
        Int8Dynamic(linear("int8", 96, 96)),
        torch.randn(1, 96, generator=torch.Generator().manual_seed(0)).bfloat16(),
    )
    alone = product(state)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True, raising=False)
    monkeypatch.setattr(torch.ops.pagegraph, "in_memory", None)  # of the form that the compiler is shown
    assert torch.equal(product(state), alone)
