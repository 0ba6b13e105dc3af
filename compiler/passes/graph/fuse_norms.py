"""Graph pass: RMS norms, the residual addition before them, gated ones and gated SiLU become one kernel each; products of one column are
sums.

The compiler's own kernels for them are as good alone, but a step of few rows is a chain of short kernels, and only ours
are set up while the one before still runs (`kernels.pdl`). What does not have exactly the known form is left as it is.
A product of one column, as that of the gate of a shared expert, is a sum over the row: the compiler has it in the kernel that makes
the row or in the one that reads the sum, where a product would be a kernel of its own. Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from pagegraph.compiler.passes.graph.patterns import call, gated_norm_of, gated_of, is_call, normed_of, rewrite, shape


def fuse_rows(module: GraphModule) -> int:
    """Rewrite every norm, gated SiLU and product of one column of `module` that has the known form; returns how many."""
    fuses = _fuse_gated_norm, _fuse_norm, _fuse_gated, _sum_one_column
    return rewrite(module, lambda node: any(fuse(module.graph, node) for fuse in fuses))


def _fuse_gated_norm(graph: Graph, node: Node) -> bool:
    found = gated_norm_of(node)
    if found is None:
        return False
    with graph.inserting_before(node):
        x, gate = (call(graph, operator.getitem, one, 0) for one in (found.source, found.gate))
        if found.gate_first:
            groups = shape(x)[-1] // found.size
            x, gate = (call(graph, "unflatten", one, -1, (groups, found.size)) for one in (x, gate))
        normed = call(graph, torch.ops.pagegraph.gated_rms_norm, x, gate, found.weight, found.eps, found.gate_first)
        rows = call(graph, "flatten", normed, *((1, 2) if found.gate_first else (0, 1)))
        _replace(node, call(graph, "unsqueeze", rows, 0) if found.gate_first else rows)
    return True


def _fuse_norm(graph: Graph, node: Node) -> bool:
    normed = normed_of(node)
    if normed is None or len(shape(node)) != 3:
        return False
    total = normed.source
    if not _is_residual(total, node):
        with graph.inserting_before(node):
            arguments = (total, normed.weight, normed.eps)
            _replace(node, graph.call_function(torch.ops.pagegraph.rms_norm, arguments))
        return True
    # In the sum's place, where both addends are known; what the norm reads besides is a parameter.
    with graph.inserting_before(total):
        arguments = (*total.args, normed.weight, normed.eps)
        both = graph.call_function(torch.ops.pagegraph.add_rms_norm, arguments)
        added, scaled = (graph.call_function(operator.getitem, (both, index)) for index in (0, 1))
    _replace(total, added)
    _replace(node, scaled)
    return True


def _is_residual(total: Node, norm: Node) -> bool:
    """Whether the normed tensor is a sum of two like it that no other norm has taken already."""
    if not is_call(total, operator.add) or not all(isinstance(one, Node) for one in total.args):
        return False
    # As text: sizes that stay open cannot be hashed.
    return len({(str(shape(one)), one.meta["example_value"].dtype) for one in (*total.args, norm)}) == 1


def _fuse_gated(graph: Graph, node: Node) -> bool:
    product = gated_of(node)
    if product is not None:
        with graph.inserting_before(node):
            _replace(node, graph.call_function(torch.ops.pagegraph.silu_mul, (product,)))
    return product is not None


def _sum_one_column(graph: Graph, node: Node) -> bool:
    if not is_call(node, torch.ops.pagegraph.linear) or node.args[2] is not None or shape(node.args[1])[0] != 1:
        return False
    with graph.inserting_before(node):
        x, weight = (call(graph, "float", one) for one in node.args[:2])
        total = call(graph, "sum", call(graph, operator.mul, x, weight), -1, True)
        _replace(node, call(graph, "to", total, node.meta["example_value"].dtype))
    return True


def _replace(old: Node, new: Node) -> None:
    new.meta = old.meta
    old.replace_all_uses_with(new)
