"""Rotary embeddings with scaling: the lengths that they reach; frequencies that depend on the length, fixed for one.

Knows transformers' rope types and what a configuration says of them; knows nothing of attention or weights.

Frequencies that depend on the length (`dynamic`, `longrope`) are fixed for `max_model_len`, because all sequences of a
step share them: above the original length every prompt gets the long ones. So the original length is the default of
`max_model_len` there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

KNOWN = frozenset({"default", *ROPE_INIT_FUNCTIONS})
# Frequencies of these depend on the length of the sequence.
BY_LENGTH = frozenset({"dynamic", "longrope"})
FIXED = "fixed"  # no type of transformers: what it stands for is never computed anew
DEFAULT_LENGTH = 2048
CONTEXT_LENGTH = "gguf_context_length"  # what a configuration made of a GGUF file has besides max_position_embeddings


def parameters_of(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rope parameters of the text model: one for all layers, one for each type of layer, or none.

    Raises ValueError where a rope type is not one of transformers'.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [one for one in rope.values() if isinstance(one, dict)]
    found = nested or ([rope] if rope else [])
    for one in found:
        if (kind := one.get("rope_type", "default")) not in KNOWN:
            raise ValueError(
                f"{text.model_type}: rope_type {kind!r} in the model's config.json is not known;"
                f" known are {', '.join(sorted(KNOWN))}"
            )
    return found


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of a sequence in tokens: the longest, the default, and how the longest comes about.

    `by_length`: rotary frequencies depend on the length.
    """

    longest: int
    default: int
    reason: str
    by_length: bool = False


def lengths(config: PretrainedConfig) -> Lengths:
    """How long sequences of the text model can be; raises ValueError where its rope type is unknown.

    The default is less than the longest if frequencies depend on the length: fixed for more than the original length,
    they change what short prompts give too. It is `gguf_context_length` where there is one: a file says it as the
    length to serve, scaling included (`compiler.gguf.config`).
    """
    text = config.get_text_config()
    reached = _reached(text)
    if (served := getattr(text, CONTEXT_LENGTH, None)) is None or reached.by_length:
        return reached
    if reached.longest <= served:
        return Lengths(served, served, f"context_length {served} of the GGUF file")
    return replace(reached, default=served)


def _reached(text: PretrainedConfig) -> Lengths:
    """Lengths by `text`'s own sizes and rope parameters; the default is the longest if frequencies are fixed."""
    named = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    own = named or DEFAULT_LENGTH
    said = f"max_position_embeddings {own}" if named else f"{own} where config.json names no length"
    scaled = parameters_of(text)
    for one in scaled:
        kind, factor, original = (
            one.get("rope_type"),
            one.get("factor"),
            one.get("original_max_position_embeddings") or own,
        )
        if kind == "longrope":
            return Lengths(own, min(original, own), said, by_length=True)
        if kind == "yarn" and factor:
            longest = int(original * factor)
            return Lengths(
                longest, longest, f"original_max_position_embeddings {original} x factor {factor:g} of rope type yarn"
            )
        # Where types of layers differ (Gemma 3), the length that config.json names is the scaled one.
        if kind in ("linear", "dynamic") and factor and len(scaled) == 1:
            longest, by_length = int(own * factor), kind in BY_LENGTH
            return Lengths(
                longest, own if by_length else longest, f"{said} x factor {factor:g} of rope type {kind}", by_length
            )
    return Lengths(own, own, said)


def fix_frequencies(model: nn.Module, length: int) -> None:
    """Fix rotary embeddings of `model`, on the CPU, to the frequencies of a sequence of `length` tokens.

    The module computes them itself: it is called with the last position of such a sequence.
    """
    for module, kinds in _by_length(model):
        for layer_type in kinds:
            last = torch.tensor([[length - 1]])
            module(torch.zeros(1), last) if layer_type is None else module(torch.zeros(1), last, layer_type=layer_type)
    stop_updates(model)


def stop_updates(model: nn.Module) -> None:
    """Keep rotary embeddings of `model` from looking at the length of a sequence."""
    for module, kinds in _by_length(model):
        if isinstance(module.rope_type, dict):
            module.rope_type |= dict.fromkeys(kinds, FIXED)
        else:
            module.rope_type = FIXED


def _by_length(model: nn.Module) -> list[tuple[nn.Module, list[str | None]]]:
    """Rotary embeddings whose frequencies depend on the length, and for which layer types (None: all)."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds if isinstance(kinds, dict) else {None: kinds}
        if wanted := [layer_type for layer_type, kind in kinds.items() if kind in BY_LENGTH]:
            found.append((module, wanted))
    return found
