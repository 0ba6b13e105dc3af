"""Weights of norms that are multiplied in float32 are held in float32, so that `fuse_norms` finds a parameter and no conversion.

Such a norm rounds once, behind the product with its weight, as GPT-OSS's does: its result keeps the dtype of its input whatever
the weight's, and its bits too, because every 16-bit value is a float32. Others, as Llama's, would give float32. Knows modules by
what they return.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


def wide_norms(model: nn.Module, device_type: str | None = None) -> int:
    """Widen the weight of every such norm of `model`, on the meta device too; returns how many. Where kernels of ours take norms."""
    norms = [one for one in model.modules() if _is_norm(one)]
    if not norms or (device_type or _weight(norms[0]).device.type) != "cuda":
        return 0
    keep = {kind: _keeps_dtype(one) for kind, one in {type(one): one for one in norms}.items()}
    found = [one for one in norms if keep[type(one)]]
    for one in found:
        _weight(one).data = _weight(one).float()
    return len(found)


def _weight(norm: nn.Module) -> nn.Parameter:
    return next(norm.parameters())


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return (
        type(module).__name__.endswith("RMSNorm")
        and names == ["weight"]
        and _weight(module).dim() == 1
        and _weight(module).dtype in (torch.bfloat16, torch.float16)
    )


def _keeps_dtype(norm: nn.Module) -> bool:
    """Whether rows [1, 2, H] come out in their dtype where the weight is in float32; on the meta device, where nothing is computed."""
    trial = copy.deepcopy(norm).to("meta")
    rows = torch.empty(1, 2, len(_weight(norm)), dtype=_weight(norm).dtype, device="meta")
    _weight(trial).data = _weight(trial).float()
    try:
        with torch.no_grad():
            out = trial(rows)
    except Exception:  # it wants more than rows, or a weight of their dtype
        return False
    return isinstance(out, torch.Tensor) and out.dtype == rows.dtype
