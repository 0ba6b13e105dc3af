"""Graph pass: rotation of queries and keys, and the norm before it, move into the attention op.

Works on the traced graph, where they are a dozen small nodes a layer that the compiler makes five
kernels of. What does not have exactly the known form is left as it is. Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from pagegraph.compiler.passes.graph.patterns import is_call, is_method, normed_of, rewrite, shape
from pagegraph.kernels.attention import cpu_decode


class Rotated(NamedTuple):
    """A tensor found to be rotate(heads): heads [1, T, H, D] before any transpose; cos, sin [1, T, D]."""

    heads: Node
    cos: Node
    sin: Node


def fuse_rope(module: GraphModule) -> int:
    """Rewrite every attention of `module` whose inputs have the known form; returns how many."""
    return rewrite(module, lambda node: node.target is torch.ops.pagegraph.paged_attention and _fuse(module, node))


def rotate_one_row(module: GraphModule) -> int:
    """The same for the CPU, without norms: where one row's attention is one call of ours."""

    def fuse(node: Node) -> bool:
        if node.target is not torch.ops.pagegraph.paged_attention or not _is_one_row(node):
            return False
        return _fuse(module, node, norms=False)

    return rewrite(module, fuse)


def _is_one_row(attention: Node) -> bool:
    query, _, _, key_cache, *_ = (one.meta["example_value"] for one in attention.args[:4])
    sinks, _, _, softcap, _ = attention.args[10:]
    rows = query.shape[0]
    return isinstance(rows, int) and rows == 1 and cpu_decode.takes(query, key_cache, sinks, softcap)


def _fuse(module: GraphModule, attention: Node, norms: bool = True) -> bool:
    query, key, value, *rest = attention.args
    both = [rotated(query), rotated(key)]
    if None in both or both[0].cos is not both[1].cos or both[0].sin is not both[1].sin:
        return False
    if not norms and both[0].cos.meta["example_value"].dtype != query.meta["example_value"].dtype:
        return False
    normed = [normed_of(one.heads) if norms else None for one in both]
    if None in normed or normed[0].eps != normed[1].eps:
        normed = [None, None]
    sources = [norm.source if norm else one.heads for norm, one in zip(normed, both)]
    weights = [norm.weight if norm else None for norm in normed]
    with module.graph.inserting_before(attention):
        first = lambda node: module.graph.call_function(operator.getitem, (node, 0))  # noqa: E731
        arguments = [*map(first, sources), value, first(both[0].cos), first(both[0].sin), *weights]
        fused = module.graph.call_function(
            torch.ops.pagegraph.rope_attention,
            (*arguments, normed[0].eps if normed[0] else 0.0, *rest),
            attention.kwargs,
        )
    fused.meta = attention.meta
    attention.replace_all_uses_with(fused)
    return True


def rotated(rows: Node) -> Rotated | None:
    """rows [T, H, D] = (x * cos + cat(-x[half:], x[:half]) * sin)[0] with the head dimension moved behind."""
    if not is_method(rows, "transpose", 0, 1) or not is_call(rows.args[0], operator.getitem, 1, 0):
        return None
    total = rows.args[0].args[0]
    if not is_call(total, operator.add):
        return None
    straight, turned = total.args
    if not (is_call(straight, operator.mul) and is_call(turned, operator.mul)):
        return None
    x, cos = straight.args
    swapped, sin = turned.args
    if not (is_method(cos, "unsqueeze", 1) and is_method(sin, "unsqueeze", 1) and is_method(x, "transpose", 1, 2)):
        return None
    size = shape(x)[-1]
    if not _is_half_swap(swapped, x, size) or size % 2:
        return None
    cos, sin = cos.args[0], sin.args[0]
    if any(len(shape(one)) != 3 or shape(one)[-1] != size for one in (cos, sin)):
        return None
    return Rotated(x.args[0], cos, sin)


def _is_half_swap(swapped: Any, x: Node, size: int) -> bool:
    if not is_call(swapped, torch.cat) or swapped.kwargs != {"dim": -1} or len(swapped.args[0]) != 2:
        return False
    negative, low = swapped.args[0]
    if not is_call(negative, operator.neg):
        return False
    half = size // 2
    return all(
        is_call(part, operator.getitem) and part.args[0] is x and part.args[1] == (Ellipsis, wanted)
        for part, wanted in ((low, slice(None, half, None)), (negative.args[0], slice(half, None, None)))
    )
