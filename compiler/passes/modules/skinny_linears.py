"""On CUDA every linear goes through `pagegraph::linear`, which picks its kernel by the number of rows of a step.

The choice is made when a bucket is captured, so a replayed graph holds the kernel alone. Knows nn.Linear and
MergedLinear; knows nothing of which sizes win.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pagegraph.compiler.passes.modules.merge_linears import MergedLinear


class SkinnyLinear(nn.Module):
    """Stands where an nn.Linear stood, with its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.pagegraph.linear(hidden_states, self.weight, self.bias)


def skinny_linears(model: nn.Module, device_type: str | None = None) -> int:
    """Route every plain linear of `model` on a GPU through the op; returns how many were. What goes through another op stays.

    device_type: where its weights will be, if not where they are.
    """

    def on_gpu(weight: torch.Tensor) -> bool:
        return (device_type or weight.device.type) == "cuda"

    routed = 0
    for parent in list(model.modules()):
        if type(parent) is MergedLinear and on_gpu(parent.weight) and parent.product is functional.linear:
            parent.product = torch.ops.pagegraph.linear
            routed += 1
        for name, child in list(parent.named_children()):
            if (
                type(child) is nn.Linear
                and on_gpu(child.weight)
                and not (child._forward_hooks or child._forward_pre_hooks)
            ):
                setattr(parent, name, SkinnyLinear(child))
                routed += 1
    return routed
