"""Modules of a model of more than text that text does not need: taken out before weights are loaded, and said so.

A tower whose package is not installed need not even be built. Knows modules and names; what text does not need is
`compiler.model.probe`'s to say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoModel, PretrainedConfig

log = logging.getLogger("pagegraph.build")

ATTRIBUTE = "left_out"  # of the model: the paths, which its checkpoint has tensors for


class NotInstalled(nn.Module):
    """Stands for a tower whose package is not installed."""


@contextmanager
def towers_if_installed(config: PretrainedConfig) -> Iterator[None]:
    """While within, models of `config` are built with `NotInstalled` where the package of a tower is missing.

    That of the text model is still asked for: ImportError.
    """
    build, text = AutoModel.from_config, type(config.get_text_config())

    def from_config(config: PretrainedConfig, **given: Any) -> nn.Module:
        try:
            return build(config, **given)
        except ImportError:
            if type(config) is text:
                raise
            return NotInstalled()

    AutoModel.from_config = from_config  # hides the one that it inherits
    try:
        yield
    finally:
        del AutoModel.from_config


def leave_out(model: nn.Module, paths: list[str]) -> None:
    """Put None where the modules at `paths` of `model` stand; weights of these names are not loaded."""
    if not paths:
        return
    size = sum(one.numel() * one.element_size() for path in paths for one in model.get_submodule(path).parameters())
    unknown = [path for path in paths if isinstance(model.get_submodule(path), NotInstalled)]
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    setattr(model, ATTRIBUTE, tuple(paths))
    besides = f", besides {', '.join(unknown)}, whose package is not installed" if unknown else ""
    log.info("text alone is served: %s left out (%s bytes of weights%s)", ", ".join(paths), f"{size:,}", besides)


def left_out_of(model: nn.Module) -> list[str]:
    """Paths of what `leave_out` took out of `model`."""
    return list(getattr(model, ATTRIBUTE, ()))


def is_left_out(model: nn.Module, name: str) -> bool:
    """Whether the parameter `name` was one of what `leave_out` took out of `model`."""
    return any(name.startswith(f"{path}.") for path in left_out_of(model))
