"""For `deterministic`: every product with a weight goes through ops that give a row the same bits whatever is beside it.

Knows nn.Linear, transformers' Conv1D, MergedLinear and the forms of quantised linears. A module that multiplies a weight in
a way of its own, such as a mixture's router and experts, is refused: its rows might come out otherwise in another step.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pagegraph.compiler.model.head import NoHead
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.compiler.passes.modules.merge_linears import MergedLinear
from pagegraph.compiler.quantization.layouts import Int4Packed, Int8Dynamic, RepackedLinear

# Modules whose rows are alike already: one is looked up, integers are added up exactly.
ALIKE = (nn.Embedding, Int8Dynamic, NoHead)


class FixedLinear(nn.Module):
    """Stands where an nn.Linear stood, with its parameters, or where a Conv1D stood."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        if isinstance(linear, Conv1D):
            self.weight = nn.Parameter(linear.weight.t().contiguous(), requires_grad=False)
        self.out_features, self.in_features = self.weight.shape

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.pagegraph.fixed_linear(hidden_states, self.weight, self.bias)


def fixed_linears(model: nn.Module) -> int:
    """Route every product of `model` through such ops; returns how many were.

    Raises UnsupportedModel where a module multiplies a weight in another way.
    """
    routed = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, MergedLinear):
            module.product = torch.ops.pagegraph.fixed_linear
        elif isinstance(module, Int4Packed):
            module.fixed = True
        elif isinstance(module, RepackedLinear):
            raise UnsupportedModel(
                "deterministic=true: quantised weights are multiplied on a GPU by kernels that are chosen by the rows of a step; load the"
                " model unquantised, or set device to cpu or deterministic to false"
            )
        elif type(module) in (nn.Linear, Conv1D) and not (module._forward_hooks or module._forward_pre_hooks):
            model.set_submodule(path, FixedLinear(module))
        elif isinstance(module, ALIKE) or all(
            one.dim() < 2 for one in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        ):
            continue
        else:
            raise UnsupportedModel(
                f"deterministic=true: {path} ({type(module).__name__}) multiplies weights in a way of its own, whose sums may depend"
                " on the other tokens of a step, as mixtures of experts do; set deterministic=false"
            )
        routed += 1
    return routed
