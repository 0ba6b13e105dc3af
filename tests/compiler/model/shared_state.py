"""What the threads that run a model share: all that its modules hold, and what was written to it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

OPAQUE = (
    type,
    FunctionType,
    MethodType,
    ModuleType,
    nn.Module,
    torch.dtype,
    torch.device,
)  # modules are looked at one by one


@contextmanager
def nothing_written(model: nn.Module) -> Iterator[None]:
    """Fail if anything that `model` holds is set meanwhile, also if it is set back, or is another thing or value
    afterwards.
    """
    written: list[str] = []

    def noted(method: Any) -> Any:
        def note(module: nn.Module, name: str, *value: Any) -> None:
            written.append(f"{type(module).__name__}.{name}")
            method(module, name, *value)

        return note

    before = held(model)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__setattr__", "__delattr__", "register_buffer"):
            patch.setattr(nn.Module, name, noted(getattr(nn.Module, name)))
        yield
    after = held(model)
    changed = [path for path in before.keys() | after.keys() if not _same(before.get(path), after.get(path))]
    assert not written and not changed, f"a forward wrote {sorted(set(written))}, and left changed {sorted(changed)}"


def held(model: nn.Module) -> dict[str, Any]:
    """Path -> value of all that the modules hold, through containers and plain objects; tensors with their content."""
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = (value, value.detach().clone())
        elif isinstance(value, dict):
            for key, one in value.items():
                walk(f"{path}[{key!r}]", one)
        elif isinstance(value, (list, tuple, set)):
            for at, one in enumerate(value):
                walk(f"{path}[{at}]", one)
        elif isinstance(value, OPAQUE) or not hasattr(value, "__dict__"):
            found[path] = value
        elif id(value) not in seen:
            seen[id(value)] = value
            walk(path, vars(value))

    for name, module in model.named_modules():
        walk(name, vars(module))
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] is other[0] and torch.equal(one[1], other[1])
    return one is other or (type(one) is type(other) and isinstance(one, (int, float, str)) and one == other)
