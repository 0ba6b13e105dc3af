"""Graph pass: linear, residual addition, norm, linear, gate in a row become one op, which may share kernels among them.

Of quantised linears the gate alone joins the one before it: norms in their kernels for few rows cost more than kernels of their own.
Runs after `fuse_rows`, whose ops it looks for. Knows FX graphs; knows no models, and not which kernels the op takes.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from compiler.passes.graph_forms import is_call, rewrite

ops = torch.ops.pagegraph
QUERY_START = {ops.paged_attention: 8, ops.rope_attention: 13}  # its place among the arguments


def fuse_linears(module: GraphModule) -> int:
    """Rewrite every such row of `module` whose inner results nothing else reads; returns how many."""
    attention = next((node for node in module.graph.nodes if is_call(node, ops.rope_attention) or is_call(node, ops.paged_attention)), None)
    if attention is None:
        return 0
    query_start = attention.args[QUERY_START[attention.target]]
    return rewrite(module, lambda node: _fuse(module.graph, node, query_start))


def _fuse(graph: Graph, second: Node, query_start: Node) -> bool:
    if is_call(second, ops.silu_mul):
        return _gate(second)
    if not is_call(second, ops.linear):
        return False
    normed = second.args[0]
    if not is_call(normed, operator.getitem, 1, 1) or not is_call(normed.args[0], ops.add_rms_norm) or len(normed.users) > 1:
        return False
    both = normed.args[0]
    *addends, norm, eps = both.args
    first = next((one for one in addends if is_call(one, ops.linear) and len(one.users) == 1), None)
    if first is None:
        return False
    residual = addends[1] if first is addends[0] else addends[0]
    gate = next(iter(second.users)) if len(second.users) == 1 else None
    gated = gate is not None and is_call(gate, ops.silu_mul)
    # In the sum's place, where all that is no parameter is known.
    with graph.inserting_before(both):
        arguments = (*first.args, residual, norm, eps, *second.args[1:], gated, query_start)
        fused = graph.call_function(ops.linear_norm_linear, arguments)
        total, out = (graph.call_function(operator.getitem, (fused, index)) for index in (0, 1))
    for old, new in ((_sum_of(both), total), (gate if gated else second, out)):
        if old is not None:
            new.meta = old.meta
            old.replace_all_uses_with(new)
    return True


def _gate(gate: Node) -> bool:
    product = gate.args[0]
    if not is_call(product, ops.fragment_linear) or len(product.users) > 1:
        return False
    product.args = (*product.args, True)
    product.meta = gate.meta
    gate.replace_all_uses_with(product)
    return True


def _sum_of(both: Node) -> Node | None:
    return next((user for user in both.users if is_call(user, operator.getitem, 1, 0)), None)
