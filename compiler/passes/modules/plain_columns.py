"""Projections whose model lays heads beside each other, each with its query, key, value and gate, give all queries first instead.

A layer with a delta rule may take its columns apart by a method of its own (`fix_query_key_value_ordering`), which is nothing but
another order of them. Weights whose rows are in that order give what the convolution reads as columns side by side, so nobody has
to copy them (`compiler.passes.graph.fuse_states`). Knows the names of the method and its two projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pagegraph.compiler.quantization.linear import QuantLinear

METHOD = "fix_query_key_value_ordering"
# Projections, in the order of the method's arguments, and how many of its results are columns of each.
PROJECTIONS = (("in_proj_qkvz", 4), ("in_proj_ba", 2))

Shapes = tuple[tuple[int, ...], ...]


@torch.no_grad()
def plain_columns(model: nn.Module) -> int:
    """Bring the rows of all such projections of `model` into the order in which they are read; returns of how many layers."""
    layers = [module for module in model.modules() if hasattr(type(module), METHOD)]
    return sum(_order(layer) for layer in layers)


def _order(layer: nn.Module) -> bool:
    linears: list[Any] = [getattr(layer, name, None) for name, _ in PROJECTIONS]
    if hasattr(layer, "column_shapes") or not all(_is_plain(linear) for linear in linears):
        return False
    numbered = [torch.arange(linear.out_features, device="cpu").view(1, 1, -1) for linear in linears]
    found = list(getattr(layer, METHOD)(*numbered))
    orders, shapes = [], []
    for (_, count), columns in zip(PROJECTIONS, numbered):
        parts, found = found[:count], found[count:]
        orders.append(torch.cat([part.flatten() for part in parts]))
        shapes.append(tuple(tuple(part.shape[2:]) for part in parts))
        if not torch.equal(orders[-1].sort().values, columns.flatten()):
            return False
    for linear, order in zip(linears, orders):
        _reorder(linear, order)
    layer.column_shapes = tuple(shapes)  # type: ignore[assignment]
    kind = type(layer)
    if not hasattr(original := getattr(kind, METHOD), "instead_of"):
        setattr(kind, METHOD, _where_ordered(original))
    return True


def _is_plain(linear: Any) -> bool:
    return type(linear) in (nn.Linear, QuantLinear) and not (linear._forward_hooks or linear._forward_pre_hooks)


def _reorder(linear: nn.Linear | QuantLinear, rows: torch.Tensor) -> None:
    """Rows of the weight, of its scales and of the bias."""
    for name in ("bias", "weight") if isinstance(linear, nn.Linear) else ("bias", "qweight", "scale", "zero"):
        held = getattr(linear, name)
        if held is not None:
            held.data = held.data[rows.to(held.device)]


def _where_ordered(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method of layers whose columns are in order; the model's own of others."""

    @functools.wraps(original)
    def parts(layer: nn.Module, *projected: torch.Tensor) -> Any:
        shapes: tuple[Shapes, ...] | None = getattr(layer, "column_shapes", None)
        if shapes is None:
            return original(layer, *projected)
        return tuple(part for one, its in zip(projected, shapes) for part in _split(one, its))

    parts.instead_of = original  # type: ignore[attr-defined]
    return parts


def _split(columns: torch.Tensor, shapes: Shapes) -> list[torch.Tensor]:
    """columns [1, T, N] -> views [1, T, *shape] side by side."""
    parts = columns.split([torch.Size(shape).numel() for shape in shapes], dim=-1)
    return [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes)]
