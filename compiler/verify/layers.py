"""What each module of a decoder gives when its layer is handed the same input as another model's: where two models part.

Every layer gets the input that the expected model's layer had, so that an error shows in the layer that makes it and
in no later one. Modules are matched by path: our model has transformers' modules, however passes have rewritten them.
Knows hooks; knows no attention and no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

ROWS = 32  # of a prompt's last tokens, whose outputs are kept


class Key(NamedTuple):
    """A call of a module in one forward: some are called several times."""

    path: str
    call: int


@dataclass(slots=True)
class Outputs:
    """Of one forward of a prompt; float32 [R, ...] of the last tokens, on the CPU."""

    given: dict[Key, torch.Tensor] = field(default_factory=dict)  # what the module got, in the order of their returning
    made: dict[Key, torch.Tensor] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)  # layer -> its whole input [1, T, H], as it was


class Part(NamedTuple):
    """Errors of a module, as shares: of what it got, and of what it made."""

    given: float
    made: float


@dataclass(frozen=True, slots=True)
class LayerReport:
    """allowed: share of what the module adds."""

    worst: str  # the layer that is nearest to what is allowed, or furthest beyond
    error: float
    allowed: float
    outside: list[str]  # layers, and modules outside of layers, that leave the band
    culprit: str  # of the first of them, the first module that does; "" where none does


def layers_of(model: Any) -> dict[str, nn.Module]:
    """The decoder's layers by path. Raises ValueError where no list of modules has as many as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{path}.{index}": layer for index, layer in enumerate(module)}
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


@contextmanager
def watched(model: Any, tokens: int, inputs: dict[str, torch.Tensor] | None = None) -> Iterator[Outputs]:
    """While within, a forward of a prompt of so many tokens through `model` is noted.

    inputs: of layers, which they get instead of their own.
    """
    outputs, calls, handles = Outputs(), Counter(), []
    layers = layers_of(model)

    def rows(one: Any) -> torch.Tensor | None:
        one = next((part for part in one if isinstance(part, torch.Tensor)), None) if isinstance(one, tuple) else one
        if not isinstance(one, torch.Tensor) or not one.is_floating_point():
            return None
        last = min(ROWS, tokens)
        if one.dim() > 2 and one.shape[0] == 1 and one.shape[1] in (tokens, last):
            one = one[0]
        elif one.dim() < 2 or one.shape[0] != tokens:
            return None
        return one[-last:].flatten(1).float().cpu()

    def enter(path: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        if inputs is None:
            outputs.whole[path] = hidden.detach().clone()
            return None
        other = inputs[path].to(hidden.device, hidden.dtype)
        return ((other, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": other})

    def leave(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        key = Key(path, calls[path])
        calls[path] += 1
        given = rows(args[0] if args else kwargs.get("hidden_states"))
        made = rows(output)
        if made is not None:
            outputs.made[key] = made
            if given is not None:
                outputs.given[key] = given

    try:
        for path, module in model.named_modules():
            if path in layers:
                handles.append(module.register_forward_pre_hook(_bound(enter, path), with_kwargs=True))
            if path:
                handles.append(module.register_forward_hook(_bound(leave, path), with_kwargs=True))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _bound(hook: Callable, path: str) -> Callable:
    return lambda *arguments: hook(path, *arguments)


def errors(expected: Outputs, found: Outputs, layers: dict[str, Any]) -> dict[Key, Part]:
    """Of each module that both have, in the order of their returning in `found`."""
    parts = {}
    for key, made in found.made.items():
        theirs = expected.made.get(key)
        if theirs is None or theirs.shape != made.shape:
            continue
        before = expected.given.get(key)
        given, added = 0.0, theirs
        if before is not None and key in found.given and found.given[key].shape == before.shape:
            given = _error(before, found.given[key], before)
            if key.path in layers and before.shape == theirs.shape:
                added = theirs - before
        parts[key] = Part(given, _error(theirs, made, added))
    return parts


def _error(expected: torch.Tensor, found: torch.Tensor, scale: torch.Tensor) -> float:
    """The median over tokens, which a few experts chosen otherwise do not move."""
    size = scale.norm(dim=1).clamp_min(1e-6 * expected.norm(dim=1).clamp_min(1e-30))
    return ((found - expected).norm(dim=1) / size).nan_to_num(nan=torch.inf).median().item()


def report(
    found: list[dict[Key, Part]], own: list[dict[Key, Part]], floor: float, times: float, layers: dict[str, Any]
) -> LayerReport:
    """Of the errors of each prompt: the engine's, and transformers' own in the same dtype (none: it was not measured)."""
    worst = {
        key: Part(*(max(column) for column in zip(*(one[key] for one in found if key in one)))) for key in found[0]
    }
    measured: dict[Key, Part] = {}
    for one in own:
        for key, part in one.items():
            old = measured.get(key, part)
            measured[key] = Part(max(old.given, part.given), max(old.made, part.made))
    allowed = {key: Part(*(max(floor, times * one) for one in measured.get(key, Part(0.0, 0.0)))) for key in worst}
    outside = [
        key for key, part in worst.items() if not part.made <= allowed[key].made and _counts(key, part, allowed, layers)
    ]
    of_layers = [key for key in worst if key.path in layers]
    nearest = max(of_layers, key=lambda key: worst[key].made / allowed[key].made)
    culprit = ""
    if outside:
        first = outside[0].path
        within = [key for key in worst if key.path == first or key.path.startswith(f"{first}.")]
        culprit = next(
            _named(key, worst[key], allowed[key]) for key in within if not worst[key].made <= allowed[key].made
        )
    return LayerReport(
        nearest.path,
        worst[nearest].made,
        allowed[nearest].made,
        list(dict.fromkeys(key.path for key in outside)),
        culprit,
    )


def _named(key: Key, part: Part, allowed: Part) -> str:
    parent, _, name = key.path.rpartition(".")
    if part.given <= allowed.given:
        return key.path
    return f"{parent}, ahead of {name}"


def _counts(key: Key, part: Part, allowed: dict[Key, Part], layers: dict[str, Any]) -> bool:
    """Whether it is a layer, or a module outside of all layers that was given what it should be."""
    if key.path in layers:
        return True
    related = any(one.startswith(f"{key.path}.") or key.path.startswith(f"{one}.") for one in layers)
    return not related and part.given <= allowed[key].given
