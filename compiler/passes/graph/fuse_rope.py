"""Graph pass: rotation of queries and keys, and the norm before it, move into the attention op.

Works on the traced graph, where they are a dozen small nodes a layer that the compiler makes five
kernels of. What does not have exactly the known form is left as it is. Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from pagegraph.compiler.passes.graph.patterns import call, is_call, is_method, normed_of, rewrite, shape
from pagegraph.kernels.attention import cpu_decode


class Rotated(NamedTuple):
    """A tensor found to be rotate(heads): heads [1, T, H, D] before any transpose; cos, sin [1, T, D], or the half that is repeated."""

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
    if None in normed or normed[0].eps != normed[1].eps or any(norm.rounds_once for norm in normed):
        normed = [None, None]
    sources = [norm.source if norm else one.heads for norm, one in zip(normed, both)]
    weights = [norm.weight if norm else None for norm in normed]
    angles = [_whole(module.graph, one, both[0].heads) for one in both[0][1:]]
    with module.graph.inserting_before(attention):
        first = lambda node: module.graph.call_function(operator.getitem, (node, 0))  # noqa: E731
        arguments = [*map(first, sources), value, *map(first, angles), *weights]
        fused = module.graph.call_function(
            torch.ops.pagegraph.rope_attention,
            (*arguments, normed[0].eps if normed[0] else 0.0, *rest),
            attention.kwargs,
        )
    fused.meta = attention.meta
    attention.replace_all_uses_with(fused)
    return True


def _whole(graph: Graph, angles: Node, heads: Node) -> Node:
    """Cosines or sines of all of a head, [1, T, D]; a half is repeated once for all layers."""
    if shape(angles)[-1] == shape(heads)[-1]:
        return angles
    repeated = ([angles, angles], -1)
    for user in angles.users:
        if is_call(user, torch.cat) and (list(user.args[0]), *user.args[1:]) == repeated:
            return user
    with graph.inserting_after(angles):
        return call(graph, torch.cat, *repeated)


def rotated(rows: Node) -> Rotated | None:
    """rows [T, H, D] = (x * cos + cat(-x[half:], x[:half]) * sin)[0] with the head dimension moved behind; or a half at a time, as
    cat(low * cos - high * sin, high * cos + low * sin)."""
    if not is_method(rows, "transpose", 0, 1) or not is_call(rows.args[0], operator.getitem, 1, 0):
        return None
    total = rows.args[0].args[0]
    if is_call(total, torch.cat):
        return _by_halves(total)
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


def _by_halves(total: Node) -> Rotated | None:
    """total [1, H, T, D] = cat((low * cos - high * sin, high * cos + low * sin), -1) with low, high = x.chunk(2, -1)."""
    if len(total.args[0]) != 2 or total.kwargs != {"dim": -1} and total.args[1:] != (-1,):
        return None
    first, second = total.args[0]
    if not is_call(first, operator.sub) or not is_call(second, operator.add):
        return None
    products = [*first.args, *second.args]
    if not all(is_call(one, operator.mul) for one in products):
        return None
    (low, cos), (high, sin), *behind = (one.args for one in products)
    if behind != [(high, cos), (low, sin)]:
        return None
    halves = low.args[0] if is_call(low, operator.getitem, 1, 0) else None
    if not is_call(halves, torch.chunk) or halves.args[1:] != (2,) or halves.kwargs != {"dim": -1}:
        return None
    x = halves.args[0]
    if not is_call(high, operator.getitem, 1, 1) or high.args[0] is not halves or not is_method(x, "transpose", 1, 2):
        return None
    if not (is_method(cos, "unsqueeze", 1) and is_method(sin, "unsqueeze", 1)):
        return None
    cos, sin, size = cos.args[0], sin.args[0], shape(x)[-1]
    if size % 2 or any(len(shape(one)) != 3 or 2 * shape(one)[-1] != size for one in (cos, sin)):
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
