"""Graph pass: where a router takes the largest of a token's scores and shares by softmax, one op does both.

It is found by `topk` of a softmax over all experts, whose results may be divided by their sum, or by a softmax behind `topk`; a
narrowing behind either joins. The product ahead of it, whose weight stands in no linear, becomes `pagegraph::linear`, which has
kernels for few rows. Routers that share by sigmoid or choose among groups are left as they are. Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.passes.graph.patterns import is_call, is_method, is_narrowing, rewrite, shape

ops = torch.ops.pagegraph
LINEARS = (torch._C._nn.linear, functional.linear)
SOFTMAXES = (functional.softmax, torch.softmax)
DIVISIONS = (operator.truediv, operator.itruediv, torch.div)
MAX_EXPERTS, MAX_CHOICES = 1024, 32


def fuse_routers(module: GraphModule) -> int:
    """Rewrite every router of `module` that has the known form; returns how many."""
    return rewrite(module, lambda node: _fuse(module.graph, node))


def _fuse(graph: Graph, node: Node) -> bool:
    scores, k = _topk(node) or (None, 0)
    if scores is None or len(shape(scores)) != 2 or k > MAX_CHOICES or shape(scores)[1] > MAX_EXPERTS:
        return False
    parts: dict[Any, Node] = {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}
    if len(parts) != len(node.users) or 0 not in parts:
        return False
    values, shared = parts[0], _softmax(scores)
    if shared is not None:
        logits, weights = shared, _divided(values)
        renormalize, weights = weights is not None, weights or values
    else:
        logits, weights = scores, next(iter(values.users)) if len(values.users) == 1 else None
        if weights is None or _softmax(weights) is not values:
            return False
        renormalize = True
    if len(weights.users) == 1 and is_narrowing(narrowed := next(iter(weights.users))):
        weights = narrowed
    logits = _widened_from(logits)
    with graph.inserting_before(node):
        arguments = (_product(graph, logits), k, renormalize, weights.meta["example_value"].dtype)
        both = graph.call_function(ops.topk_softmax, arguments)
        for index, old in ((0, weights), (1, parts.get(1))):
            if old is not None:
                new = graph.call_function(operator.getitem, (both, index))
                new.meta = old.meta
                old.replace_all_uses_with(new)
    return True


def _topk(node: Node) -> tuple[Node, int] | None:
    """What the largest are taken of over the last dimension, and how many."""
    named = is_call(node, torch.topk) or (node.op == "call_method" and node.target == "topk")
    if not named or len(node.args) != 2 or not isinstance(node.args[1], int):
        return None
    if node.kwargs.get("dim", -1) != -1 or not node.kwargs.get("largest", True):
        return None
    return node.args[0], node.args[1]  # type: ignore[return-value]


def _softmax(node: Node) -> Node | None:
    """Of what `node` is the softmax over the second of two dimensions, computed in float32 and, but behind `topk`, left so."""
    if not any(is_call(node, one) for one in SOFTMAXES) or len(shape(node)) != 2:
        return None
    source, *dim = node.args
    if dim + [node.kwargs[name] for name in ("dim",) if name in node.kwargs] not in ([-1], [1]):
        return None
    behind = isinstance(source, Node) and is_call(source, operator.getitem)
    return source if behind or node.meta["example_value"].dtype == torch.float32 else None  # type: ignore[return-value]


def _divided(values: Node) -> Node | None:
    """values / values.sum(-1, keepdim=True), where nothing else reads the values."""
    total = next((user for user in values.users if is_method(user, "sum")), None)
    if total is None or total.kwargs != {"dim": -1, "keepdim": True} or len(total.users) != 1 or len(values.users) != 2:
        return None
    (divided,) = total.users
    return divided if divided.args == (values, total) and any(is_call(divided, one) for one in DIVISIONS) else None


def _widened_from(node: Node) -> Node:
    """The op computes in float32 whatever it is given."""
    wide = is_method(node, "float") or is_method(node, "to", torch.float32)
    return node.args[0] if wide else node  # type: ignore[return-value]


def _product(graph: Graph, logits: Node) -> Node:
    """The same by the op, of a plain weight."""
    if not any(is_call(logits, one) for one in LINEARS) or logits.kwargs:
        return logits
    x, weight, *bias = logits.args
    if not all(isinstance(one, Node) and one.op == "placeholder" for one in (weight, *bias) if one is not None):
        return logits
    product = graph.call_function(ops.linear, (x, weight, *bias) if bias else (x, weight, None))
    product.meta = logits.meta
    return product
