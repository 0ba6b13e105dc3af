"""The rows of a step computed in other steps, over blocks that hold their keys and values already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def rows_one_by_one(attention: Callable[..., torch.Tensor], arguments: tuple, **more: Any) -> torch.Tensor:
    """Each live row of a step [T, Hq, D] as a step of its own -> [rows, Hq, Dv]; `arguments` of a step that has run."""
    query, key, value, key_cache, value_cache, positions, slots, tables, starts, _, *features = arguments
    rows = []
    for sequence, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
        for row in range(begin, end):
            here = slice(row, row + 1)
            alone = (
                query[here], key[here], value[here], key_cache, value_cache, positions[here], slots[here],
                tables[sequence : sequence + 1], starts.new_tensor([0, 1]), positions[here] + 1,
            )  # fmt: skip
            rows.append(attention(*alone, *features, **more))
    return torch.cat(rows)
