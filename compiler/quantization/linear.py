"""The modules that stand where a quantised linear or quantised experts stood, and siblings of one input stacked into one. Knows no device."""

from __future__ import annotations

import torch
from torch import nn

from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.weight import QuantWeight

TENSORS = ("qweight", "scale", "zero", "g_idx_order")


class QuantModule(nn.Module):
    """A linear that holds a `QuantWeight`: its tensors are buffers, which move with the model, its bias a parameter."""

    def __init__(self, weight: QuantWeight) -> None:
        super().__init__()
        for name in TENSORS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.bias = None if weight.bias is None else nn.Parameter(weight.bias, requires_grad=False)
        self.group, self.out_features = weight.group, weight.out_size

    @property
    def quantized(self) -> QuantWeight:
        """What it holds, as one."""
        return QuantWeight(
            self.qweight, self.scale, self.zero, self.bias, self.group, self.out_features, self.g_idx_order
        )

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] with its elements in the order of the weight's columns."""
        return x if self.g_idx_order is None else x.index_select(-1, self.g_idx_order)


class QuantLinear(QuantModule):
    """x [..., K] -> [..., N] with a weight as it was loaded; `forward` is the op that serves every device."""

    def __init__(self, weight: QuantWeight, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.in_features, self.bits = weight.in_size, weight.bits
        self.dtype = dtype  # of inputs and results
        tell_dtype(self, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.pagegraph.quant_linear(
            self.ordered(x), self.qweight, self.scale, self.zero, self.bias, self.group
        )

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] in `dtype`, columns in the order of the inputs."""
        weight = reference.dequantize(self.qweight, self.scale, self.zero, self.group)
        if self.g_idx_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.g_idx_order, weight)
        return weight.to(self.dtype)


class QuantExperts(QuantModule):
    """Weights [E, N, K] of a layer's experts as they were loaded, where their parameter stood; not called."""

    def __init__(self, weight: QuantWeight, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype  # of inputs and results

    def dequantized(self) -> torch.Tensor:
        """The weights [E, N, K] in `dtype`."""
        return torch.stack(
            [
                reference.dequantize(
                    *(None if held is None else held[expert] for held in self.quantized[:3]), self.group
                ).to(self.dtype)
                for expert in range(len(self.qweight))
            ]
        )


def tell_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a quantised linear an empty weight: some forwards ask a head's for its dtype."""
    module.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)


def stacked(linears: list[QuantLinear]) -> QuantLinear:
    """Linears of one input as one, rows below each other; `stackable` says of which."""
    first = linears[0].quantized
    zero = None
    if any(linear.zero is not None for linear in linears):
        zero = torch.cat([torch.zeros_like(linear.scale) if linear.zero is None else linear.zero for linear in linears])
    weight = first._replace(
        qweight=torch.cat([linear.qweight for linear in linears]),
        scale=torch.cat([linear.scale for linear in linears]),
        zero=zero,
        bias=None if first.bias is None else torch.cat([linear.bias for linear in linears]),
        out_size=sum(linear.out_features for linear in linears),
    )
    return QuantLinear(weight, linears[0].dtype)


def stackable(linears: list[QuantLinear]) -> bool:
    """Whether every row keeps its values and scales when the linears become one."""
    first = linears[0]
    alike = {
        (one.in_features, one.qweight.dtype, one.qweight.device, one.group, one.bias is None, one.dtype)
        for one in linears
    }
    if len(alike) != 1 or any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return False
    if first.g_idx_order is None:
        return all(linear.g_idx_order is None for linear in linears)
    return all(linear.g_idx_order is not None and _same(linear.g_idx_order, first.g_idx_order) for linear in linears)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Orders without values are taken for the same: siblings see the same inputs."""
    return one.is_meta or torch.equal(one, other)
