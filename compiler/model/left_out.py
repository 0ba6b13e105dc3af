"""Modules of a model of more than text that text does not need: taken out before weights are loaded, and said so.

Knows modules and names; what text does not need is `compiler.model.probe`'s to say.
"""

from __future__ import annotations

import logging

from torch import nn

log = logging.getLogger("pagegraph.build")

ATTRIBUTE = "left_out"  # of the model: the paths, which its checkpoint has tensors for


def leave_out(model: nn.Module, paths: list[str]) -> None:
    """Put None where the modules at `paths` of `model` stand; weights of these names are not loaded."""
    if not paths:
        return
    size = sum(one.numel() * one.element_size() for path in paths for one in model.get_submodule(path).parameters())
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    setattr(model, ATTRIBUTE, tuple(paths))
    log.info("text alone is served: %s left out (%s bytes of weights)", ", ".join(paths), f"{size:,}")


def left_out_of(model: nn.Module) -> list[str]:
    """Paths of what `leave_out` took out of `model`."""
    return list(getattr(model, ATTRIBUTE, ()))


def is_left_out(model: nn.Module, name: str) -> bool:
    """Whether the parameter `name` was one of what `leave_out` took out of `model`."""
    return any(name.startswith(f"{path}.") for path in left_out_of(model))
