"""Graph pass for the CPU: a product of one row in a narrow dtype becomes a sum that the compiler writes loops for.

PyTorch's product of one bfloat16 row reads its weight at half the speed of such a loop. The states are rounded to memory
first: the compiler would repeat in every output what they are computed from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

from compiler.passes.graph_forms import is_call, rewrite, shape

LINEAR = torch._C._nn.linear  # as TorchDynamo writes functional.linear down
NARROW = (torch.bfloat16, torch.float16)


def one_row_linears(module: GraphModule) -> int:
    """Rewrite the graph in place; returns the number of products rewritten."""
    return rewrite(module, _summed)


def _summed(node: Node) -> bool:
    if not (is_call(node, LINEAR) or is_call(node, functional.linear)):
        return False
    states, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    dtype = node.meta["example_value"].dtype
    if dtype not in NARROW or any(not isinstance(size, int) or size != 1 for size in shape(node)[:-1]):
        return False
    with node.graph.inserting_before(node):
        summed = _one_row(node.graph, states, weight, bias, dtype, shape(node))
    node.replace_all_uses_with(summed)
    return True


def _one_row(graph: Graph, states: Node, weight: Node, bias: Node | None, dtype: torch.dtype, size: torch.Size) -> Node:
    """states [1, .., K] @ weight [N, K].T + bias [N] -> [1, .., N], summed in float32."""
    row = _call(graph, "float", _call(graph, "reshape", _call(graph, torch.ops.pagegraph.in_memory, states), -1))
    out = _call(graph, "sum", _call(graph, operator.mul, _call(graph, "float", weight), row), -1)
    if bias is not None:
        out = _call(graph, operator.add, out, _call(graph, "float", bias))
    return _call(graph, "view", _call(graph, "to", out, dtype), tuple(size))


def _call(graph: Graph, target: Callable | str, *arguments: Any) -> Node:
    """The node with its example value, without which the compiler's cache takes no call of a method."""
    values = [one.meta["example_value"] if isinstance(one, Node) else one for one in arguments]
    if isinstance(target, str):
        node, value = graph.call_method(target, arguments), getattr(values[0], target)(*values[1:])
    else:
        node, value = graph.call_function(target, arguments), target(*values)
    node.meta["example_value"] = value
    return node
