"""q, k and v, and gate and up, as one matmul each: sibling linears that read the same input.

The parent's forward stays as it is: it calls three modules, the first of which computes all and keeps the others'
slices until they are asked for. The weights are one parameter; the separate ones are gone.
"""

from __future__ import annotations

import torch
from torch import nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
TOLERANCE = 1e-2  # largest relative difference in bfloat16; float32 stays far below


class MergedLinear(nn.Module):
    """One linear of several outputs, and the slices of the last input that nobody has taken yet."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        self.pending: dict[int, torch.Tensor] = {}
        self.source: torch.Tensor | None = None

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Output `index` for input x [..., in_features]; computes all outputs at the first part of an input."""
        if self.source is not x or index not in self.pending:
            outputs = nn.functional.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
            self.pending = dict(enumerate(outputs))
            self.source = x
        out = self.pending.pop(index)
        if not self.pending:
            self.source = None  # the input is not kept alive between steps
        return out


class Part(nn.Module):
    """Stands where one of the merged linears stood."""

    def __init__(self, merged: MergedLinear, index: int, original: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.index = index
        self._merged = (merged,)  # in a tuple: the weights belong to the parent alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._merged[0].part(self.index, x)


def match(module: nn.Module) -> list[tuple[str, ...]]:
    """Groups of names in `module` that can be merged: plain linears alike in input size and bias."""
    groups = []
    for names in SIBLINGS:
        linears = [getattr(module, name, None) for name in names]
        if (
            all(type(linear) is nn.Linear for linear in linears)
            and len({linear.in_features for linear in linears}) == 1
            and len({linear.bias is None for linear in linears}) == 1
        ):
            groups.append(names)
    return groups


def rewrite(model: nn.Module) -> int:
    """Merge every match -> how many groups. Raises ArithmeticError if a merged group computes something else."""
    merged_groups = 0
    for module in list(model.modules()):
        for names in match(module):
            linears = [getattr(module, name) for name in names]
            merged = MergedLinear(linears)
            check(merged, linears)
            setattr(module, "merged_" + "_".join(name.removesuffix("_proj") for name in names), merged)
            for index, (name, linear) in enumerate(zip(names, linears)):
                setattr(module, name, Part(merged, index, linear))
            merged_groups += 1
    return merged_groups


def check(merged: MergedLinear, linears: list[nn.Linear]) -> None:
    """The merged outputs against the separate ones on random input."""
    weight = linears[0].weight
    x = torch.randn(3, weight.shape[1], dtype=torch.float32).to(weight)
    for index, linear in enumerate(linears):
        expected, got = linear(x), merged.part(index, x)
        if not torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max())):
            raise ArithmeticError("merged linears differ from the separate ones")
