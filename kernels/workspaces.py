"""What an op holds on CUDA while it runs, beside its arguments and results: a table of bytes by op, beside the table of ops.

Blocks are listed in the order in which they are taken, and lie beside each other. Those of a few kilobytes are left out. Imports no
kernel: sizes are those of the tensors that `kernels.*.cuda` make, and of PyTorch's own sort.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph

DELTA_CHUNK = 64  # rows of a chunk, as `kernels.state.delta_chunks` has it


def workspace_of(op: Any, arguments: Mapping[str, Any]) -> list[int]:
    """Bytes of each block that `op`, called with arguments by name, holds within."""
    return WORKSPACES[op](arguments) if op in WORKSPACES else []


def _sort(given: Mapping[str, Any]) -> list[int]:
    """By segments, of 128 rows or more: where each element was, int64, and keys and places between the passes."""
    x = given["self"]
    return [8 * x.numel(), (x.element_size() + 8) * x.numel()]


def _experts(given: Mapping[str, Any]) -> list[int]:
    """A row for each pair: of x in the order of experts, of what is between the products, and of what is summed up."""
    x, down = given["x"], given["down"]
    inner = given["inner"] if "inner" in given else down.numel() // (down.shape[0] * x.shape[1])
    pairs, hidden, size = given["chosen"].numel(), x.shape[1], x.element_size()
    if given.get("quantize_x"):  # rows of both products in a byte, too: of x before they are in that order as well
        return [x.shape[0] * hidden, *(pairs * one for one in (hidden, inner * size, inner, hidden * size))]
    return [pairs * one * size for one in (hidden, inner, hidden)]


def _gated_delta(given: Mapping[str, Any]) -> list[int]:
    """What chunks leave for each other, of bfloat16 models."""
    key, value = given["key"], given["value"]
    tokens, heads, size = value.shape
    width, narrow = key.shape[2], value.element_size()
    if value.dtype != torch.bfloat16 or tokens <= len(given["slots"]):
        return []
    rows = [narrow * size, narrow * width, narrow * DELTA_CHUNK]
    if given["decay"].dim() == 3:
        rows += [4 * DELTA_CHUNK, narrow * width, narrow * width]
    return [tokens * heads * one for one in rows]


aten, ours = torch.ops.aten, torch.ops.pagegraph
WORKSPACES: dict[Any, Callable[[Mapping[str, Any]], list[int]]] = {
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    ours.experts.default: _experts,
    ours.repacked_experts.default: _experts,
    ours.gated_delta.default: _gated_delta,
}
