"""Cosines and sines of the positions are computed once a step instead of in every layer.

The compiler sees that they are cheap to recompute from the positions and repeats them wherever they are used; an
opaque copy stands in the way. Knows the name that transformers gives to rotary modules and nothing else of models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def rotary_once(model: nn.Module) -> int:
    """Put the opaque copy behind every rotary embedding of `model`; returns how many."""
    found = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    for module in found:
        module.register_forward_hook(_materialized)
    return len(found)


def _materialized(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return torch.ops.pagegraph.materialize(outputs)
    return tuple(torch.ops.pagegraph.materialize(one) for one in outputs)
