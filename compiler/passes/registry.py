"""The passes over a loaded model, in their order. Each file has `match`, `rewrite` and `check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from compiler.passes import merge_linears

# (name, switched on by, rewrite): a pass changes layout and speed, never results.
PASSES: tuple[tuple[str, Callable[[Any], bool], Callable[[nn.Module], int]], ...] = (
    ("merge_linears", lambda config: config.merge_linears, merge_linears.rewrite),
)


def apply(model: nn.Module, config: Any) -> dict[str, int]:
    """Run the passes that `config` switches on -> places each one changed."""
    return {name: rewrite(model) for name, enabled, rewrite in PASSES if enabled(config)}
