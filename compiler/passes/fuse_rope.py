"""Graph pass: rotation of queries and keys, and the norm before it, move into the attention op.

Works on the graph that TorchDynamo captured, where they are a dozen small nodes a layer that the compiler makes five
kernels of. What does not have exactly the known form is left as it is. Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node


class Rotated(NamedTuple):
    """A tensor found to be rotate(heads): heads [1, T, H, D] before any transpose; cos, sin [1, T, D]."""

    heads: Node
    cos: Node
    sin: Node


class Normed(NamedTuple):
    """heads = RMS norm of `source` over its last dimension, times `weight`."""

    source: Node
    weight: Node
    eps: float


def fuse_rope(module: GraphModule) -> int:
    """Rewrite every attention of `module` whose inputs have the known form; returns how many."""
    fused = 0
    for node in list(module.graph.nodes):
        if node.target is torch.ops.pagegraph.paged_attention and _fuse(module, node):
            fused += 1
    if fused:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return fused


def _fuse(module: GraphModule, attention: Node) -> bool:
    query, key, value, *rest = attention.args
    rotated = [_rotated(query), _rotated(key)]
    if None in rotated or rotated[0].cos is not rotated[1].cos or rotated[0].sin is not rotated[1].sin:
        return False
    normed = [_normed(one.heads) for one in rotated]
    if None in normed or normed[0].eps != normed[1].eps:
        normed = [None, None]
    sources = [norm.source if norm else one.heads for norm, one in zip(normed, rotated)]
    weights = [norm.weight if norm else None for norm in normed]
    with module.graph.inserting_before(attention):
        first = lambda node: module.graph.call_function(operator.getitem, (node, 0))  # noqa: E731
        arguments = [*map(first, sources), value, first(rotated[0].cos), first(rotated[0].sin), *weights]
        fused = module.graph.call_function(
            torch.ops.pagegraph.rope_attention, (*arguments, normed[0].eps if normed[0] else 0.0, *rest), attention.kwargs
        )
    fused.meta = attention.meta
    attention.replace_all_uses_with(fused)
    module.graph.erase_node(attention)
    return True


def _rotated(rows: Node) -> Rotated | None:
    """rows [T, H, D] = (x * cos + cat(-x[half:], x[:half]) * sin)[0] with the head dimension moved behind."""
    if not _is_method(rows, "transpose", 0, 1) or not _is_call(rows.args[0], operator.getitem, 1, 0):
        return None
    total = rows.args[0].args[0]
    if not _is_call(total, operator.add):
        return None
    straight, turned = total.args
    if not (_is_call(straight, operator.mul) and _is_call(turned, operator.mul)):
        return None
    x, cos = straight.args
    swapped, sin = turned.args
    if not (_is_method(cos, "unsqueeze", 1) and _is_method(sin, "unsqueeze", 1) and _is_method(x, "transpose", 1, 2)):
        return None
    size = _shape(x)[-1]
    if not _is_half_swap(swapped, x, size) or size % 2:
        return None
    cos, sin = cos.args[0], sin.args[0]
    if any(len(_shape(one)) != 3 or _shape(one)[-1] != size for one in (cos, sin)):
        return None
    return Rotated(x.args[0], cos, sin)


def _is_half_swap(swapped: Any, x: Node, size: int) -> bool:
    if not _is_call(swapped, torch.cat) or swapped.kwargs != {"dim": -1} or len(swapped.args[0]) != 2:
        return False
    negative, low = swapped.args[0]
    if not _is_call(negative, operator.neg):
        return False
    half = size // 2
    return all(
        _is_call(part, operator.getitem) and part.args[0] is x and part.args[1] == (Ellipsis, wanted)
        for part, wanted in ((low, slice(None, half, None)), (negative.args[0], slice(half, None, None)))
    )


def _normed(heads: Node) -> Normed | None:
    """heads = weight * (x * rsqrt(mean(x ** 2, -1, keepdim) + eps)).to(dtype) with x = source.to(float32)."""
    if not _is_call(heads, operator.mul):
        return None
    weight, narrowed = heads.args
    if not (isinstance(weight, Node) and weight.op == "placeholder" and _is_narrowing(narrowed)):
        return None
    product = narrowed.args[0]
    if not _is_call(product, operator.mul):
        return None
    wide, scale = product.args
    if not (_is_method(wide, "to", torch.float32) and _is_call(scale, torch.rsqrt)):
        return None
    shifted = scale.args[0]
    if not _is_call(shifted, operator.add) or not isinstance(shifted.args[1], float):
        return None
    mean = shifted.args[0]
    if not _is_method(mean, "mean", -1) or mean.kwargs != {"keepdim": True}:
        return None
    if not _is_method(mean.args[0], "pow", 2) or mean.args[0].args[0] is not wide:
        return None
    if tuple(_shape(weight)) != (_shape(heads)[-1],):
        return None
    return Normed(wide.args[0], weight, shifted.args[1])


def _is_call(node: Any, target: Any, *at: Any) -> bool:
    """A call of the function; `at`: (position, value) of an argument it must have."""
    if not (isinstance(node, Node) and node.op == "call_function" and node.target is target):
        return False
    return not at or node.args[at[0]] == at[1]


def _is_method(node: Any, name: str, *arguments: Any) -> bool:
    """A call of the method with these further arguments."""
    return isinstance(node, Node) and node.op == "call_method" and node.target == name and node.args[1:] == arguments


def _is_narrowing(node: Any) -> bool:
    return isinstance(node, Node) and node.target == "to" and len(node.args) == 2 and isinstance(node.args[1], torch.dtype)


def _shape(node: Node) -> torch.Size:
    return node.meta["example_value"].shape
