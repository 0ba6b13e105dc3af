"""Sibling projections of one input become one matrix product, with no extra weight memory, quantised or not.

q/k/v and gate/up are found by the names transformers gives them. The parent's forward stays as it is: each
projection is replaced by a part that hands out its slice of the shared product. Knows linears and names;
knows nothing of attention, devices or compilation.

Merging is surgery on modules, not a graph pass, because a graph pass would need private bookkeeping to rebind
parameters. Both are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pagegraph.compiler.model.forward_local import forward_local
from pagegraph.compiler.quantization.linear import QuantLinear, stackable, stacked

GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
CHECK_ROWS = 4
CHECK_ULPS = 16


class MergedLinear(nn.Module):
    """The stacked weights [sum of out, in] (and biases) of several linears that read the same input."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        self.bias = None
        if linears[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
        self.product = functional.linear  # (states, weight, bias) -> states @ weight.T + bias

    def whole(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """states [..., in] -> [..., sum of out]."""
        return self.product(hidden_states, self.weight, self.bias)

    def part(self, hidden_states: torch.Tensor, index: int) -> torch.Tensor:
        """states [..., in] -> the output [..., sizes[index]] of the linear at `index`.

        The product is formed at the first call with an input, and kept with the forward until every part was asked for, in
        any order. Another input, or a part asked for again, forms it anew: wasteful but right; so does each part outside
        of a `PagedModel`'s forward. Nothing is kept on the module, which other threads run too.
        """
        products = forward_local.products
        if products is None:
            return self._parts(hidden_states)[index]
        source, parts = products.get(self, (None, {}))
        if source is not hidden_states or index not in parts:
            parts = dict(enumerate(self._parts(hidden_states)))
            products[self] = hidden_states, parts
        out = parts.pop(index)
        if not parts:
            del products[self]
        return out

    def _parts(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.whole(hidden_states).split(self.sizes, dim=-1)


class MergedQuantLinear(MergedLinear):
    """The same of quantised linears: their rows stacked in one."""

    def __init__(self, linears: list[QuantLinear]) -> None:
        nn.Module.__init__(self)
        self.sizes = [linear.out_features for linear in linears]
        self.linear = stacked(linears)

    def whole(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


class LinearPart(nn.Module):
    """Stands where one of the merged linears stood."""

    def __init__(self, merged: MergedLinear, index: int) -> None:
        super().__init__()
        self.merged = merged
        self.index = index

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.merged.part(hidden_states, self.index)


@torch.no_grad()
def merge_linears(model: nn.Module) -> int:
    """Merge every group in `model` (weights loaded) in place; returns how many groups were merged.

    Raises ArithmeticError where a merged product differs from the separate ones by more than rounding.
    """
    # No linear is held here: each is to go when its group is merged.
    parents = [(path, module) for path, module in model.named_modules() if type(module) not in (nn.Linear, QuantLinear)]
    return sum(_merge(parent, names, path) for path, parent in parents for names in GROUPS)


def _mergeable(linears: list[Any]) -> bool:
    if all(type(linear) is QuantLinear for linear in linears):
        return stackable(linears)
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    if any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return False
    alike = {(linear.in_features, linear.weight.dtype, linear.weight.device, linear.bias is None) for linear in linears}
    return len(alike) == 1


def _merge(parent: nn.Module, names: tuple[str, ...], path: str) -> bool:
    linears = [getattr(parent, name, None) for name in names]
    if not _mergeable(linears):
        return False
    merged = MergedQuantLinear(linears) if type(linears[0]) is QuantLinear else MergedLinear(linears)
    _check(merged, linears, f"{path}: {', '.join(names)}")
    for index, name in enumerate(names):
        setattr(parent, name, LinearPart(merged, index))
    return True


def _check(merged: MergedLinear, linears: list[nn.Linear] | list[QuantLinear], where: str) -> None:
    """Compare the parts with the separate linears on random rows, within a few roundings of the largest value.

    Weights without values have nothing to compare.
    """
    first = linears[0]
    quantised = type(first) is QuantLinear
    device, dtype = (first.qweight.device, first.dtype) if quantised else (first.weight.device, first.weight.dtype)
    if device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(CHECK_ROWS, first.in_features, generator=generator).to(device, dtype)
    for index, linear in enumerate(linears):
        expected = linear(rows).float()
        difference = (merged.part(rows, index).float() - expected).abs().max()
        allowed = CHECK_ULPS * torch.finfo(dtype).eps * expected.abs().max()
        if not difference <= allowed:
            raise ArithmeticError(f"{where}: merged and separate products differ by {difference.item():.3g}")
