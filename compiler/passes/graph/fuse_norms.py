"""Graph pass: RMS norms, the residual addition before them, and gated SiLU become one kernel each.

The compiler's own kernels for them are as good alone, but a step of few rows is a chain of short kernels, and only ours
are set up while the one before still runs (`kernels.pdl`). What does not have exactly the known form is left as it is.
Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from pagegraph.compiler.passes.graph.patterns import gated_of, is_call, normed_of, rewrite, shape


def fuse_rows(module: GraphModule) -> int:
    """Rewrite every norm and gated SiLU of `module` that has the known form; returns how many."""
    return rewrite(module, lambda node: _fuse_norm(module.graph, node) or _fuse_gated(module.graph, node))


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


def _replace(old: Node, new: Node) -> None:
    new.meta = old.meta
    old.replace_all_uses_with(new)
