"""Graph pass: linear, residual addition, norm, linear, gate in a row become one op, which may share kernels among them.

Of a mixture the second linear is its router, and the experts read the norm too; they take the residual addition behind
them, so that norm and linear behind that become one op.
Of quantised linears it is addition, norm, linear, or these with a gate and a second linear behind: what is ahead of a product of many
rows is done where its rows are quantised. For few rows norms in the products' kernels cost more than kernels of their own. A gate that
joins no such row joins the product before it alone.
Runs after `fuse_rows` and `fuse_routers`, whose ops it looks for. Knows FX graphs; knows no models, and not which kernels the op takes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.passes.graph.patterns import call, is_call, is_view, rewrite

ops = torch.ops.pagegraph
LINEAR_ARGUMENTS = 3  # without a gate
REPACKED_ARGUMENTS = 8  # of a repacked_linear without a gate; the last says whether rows may be quantised
QUERY_START = {ops.paged_attention: 8, ops.rope_attention: 13}  # its place among the arguments


def fuse_linears(module: GraphModule) -> int:
    """Rewrite every such row of `module` whose inner results nothing else reads; returns how many."""
    attention = next(
        (
            node
            for node in module.graph.nodes
            if is_call(node, ops.rope_attention) or is_call(node, ops.paged_attention)
        ),
        None,
    )
    if attention is None:
        return 0
    query_start = attention.args[QUERY_START[attention.target]]
    return rewrite(module, lambda node: _fuse(module.graph, node, query_start))


def _fuse(graph: Graph, second: Node, query_start: Node) -> bool:
    if is_call(second, ops.silu_mul):
        return _gate(second)
    if is_call(second, ops.repacked_linear):
        return _fuse_repacked(graph, second)
    if not _is_linear(second):
        return False
    reader = next(iter(second.users)) if len(second.users) == 1 else None
    if reader is not None and is_call(reader, ops.topk_softmax):
        return _fuse_router(graph, second, query_start)
    both = _norm_before(second)
    if both is None:
        return False
    gated = reader is not None and is_call(reader, ops.silu_mul)
    last, behind = reader if gated else second, (*both.args[2:], *second.args[1:], gated)
    if parts := _addends(both, _is_linear):
        first, residual = parts
        arguments = (*first.args, residual, *behind, False, query_start)
        _replace(graph, both, last, ops.linear_norm_linear, arguments)
    elif parts := _addends(both, lambda one: is_call(one, ops.experts) and not one.kwargs):
        _add_in_experts(graph, both, *parts, last, (*behind, query_start))
    else:
        return False
    return True


def _is_linear(node: Node) -> bool:
    """Without a gate."""
    return is_call(node, ops.linear) and len(node.args) == LINEAR_ARGUMENTS


def _addends(both: Node, wanted: Callable[[Node], bool]) -> tuple[Node, Node] | None:
    """(the wanted of the two that are added, which nothing else reads, the other one)."""
    left, right = both.args[:2]
    for one, other in ((left, right), (right, left)):
        found = _seen_through(one, alone=True)
        if found is not None and wanted(found):
            return found, other
    return None


def _seen_through(node: Node, alone: bool) -> Node | None:
    """What `node` is a view of; alone: None where anything else reads that, or a view on the way."""
    while not (alone and len(node.users) > 1):
        if not is_view(node):
            return node
        node = node.args[0]  # type: ignore[assignment]
    return None


def _fuse_router(graph: Graph, router: Node, query_start: Node) -> bool:
    normed = _seen_through(router.args[0], alone=False)
    both = normed.args[0] if is_call(normed, operator.getitem, 1, 1) else None
    parts = _addends(both, _is_linear) if is_call(both, ops.add_rms_norm) else None
    if parts is None:
        return False
    first, residual = parts
    with graph.inserting_before(both):
        arguments = (*first.args, residual, *both.args[2:], *router.args[1:], False, True, query_start)
        fused = call(graph, ops.linear_norm_linear, *arguments)
        total, out, norm = (call(graph, operator.getitem, fused, index) for index in range(3))
        logits = call(graph, "flatten", out, 0, -2)
    for old, new in ((_sum_of(both), total), (normed, norm), (router, logits)):
        if old is not None:
            old.replace_all_uses_with(new)
    return True


def _add_in_experts(graph: Graph, both: Node, experts: Node, residual: Node, last: Node, behind: tuple) -> None:
    """experts [T, H]; the sum is [1, T, H]. behind: of the op of norm and linear what follows the sum."""
    with graph.inserting_before(both):
        flat = call(graph, "flatten", residual, 0, 1)
        added = graph.call_function(ops.experts, experts.args, {"residual": flat})
        added.meta = experts.meta
        total = call(graph, "unsqueeze", added, 0)
        out = call(graph, ops.norm_linear, total, *behind)
    for old, new in ((_sum_of(both), total), (last, out)):
        if old is not None:
            old.replace_all_uses_with(new)


def _fuse_repacked(graph: Graph, last: Node) -> bool:
    if len(last.args) != REPACKED_ARGUMENTS:
        return False
    gated = last.args[0]
    if len(last.users) == 1 and is_call(next(iter(last.users)), ops.silu_mul):
        return False  # the gate joins it first, and then maybe the linear behind
    pair = is_call(gated, ops.repacked_linear) and len(gated.args) == REPACKED_ARGUMENTS + 1 and len(gated.users) == 1
    first = gated if pair else last
    both = _norm_before(first)
    if both is None or pair and first.args[REPACKED_ARGUMENTS - 1] != last.args[REPACKED_ARGUMENTS - 1]:
        return False
    behind = last.args[1 : REPACKED_ARGUMENTS - 1] if pair else (None, None, None, None, 0, 0)
    quantize_x = first.args[REPACKED_ARGUMENTS - 1]
    arguments = (*both.args, quantize_x, *first.args[1 : REPACKED_ARGUMENTS - 1], *behind)
    _replace(graph, both, last, ops.norm_repacked_linear, arguments)
    return True


def _norm_before(product: Node) -> Node | None:
    """The addition with norm whose result this product alone reads."""
    normed = product.args[0]
    if (
        not is_call(normed, operator.getitem, 1, 1)
        or not is_call(normed.args[0], ops.add_rms_norm)
        or len(normed.users) > 1
    ):
        return None
    return normed.args[0]


def _replace(graph: Graph, both: Node, last: Node, op: Callable, arguments: tuple) -> None:
    """The op's sum and product in the place of the sum of addition and norm and of the last node of a row."""
    with graph.inserting_before(both):  # where all that is no parameter is known
        fused = graph.call_function(op, arguments)
        total, out = (graph.call_function(operator.getitem, (fused, index)) for index in (0, 1))
    for old, new in ((_sum_of(both), total), (last, out)):
        if old is not None:
            new.meta = old.meta
            old.replace_all_uses_with(new)


def _gate(gate: Node) -> bool:
    product = gate.args[0]
    known = any(is_call(product, op) for op in (ops.linear, ops.repacked_linear, ops.fixed_linear))
    if not known or not gate.users or len(product.users) > 1:  # one without users is in such a row already
        return False
    product.args = (*product.args, True)
    product.meta = gate.meta
    gate.replace_all_uses_with(product)
    gate.graph.erase_node(gate)  # now, so that the product is seen to have one reader
    return True


def _sum_of(both: Node) -> Node | None:
    return next((user for user in both.users if is_call(user, operator.getitem, 1, 0)), None)
