"""Graph pass for the CPU: a product of one row in a narrow dtype becomes a sum that the compiler writes loops for.

PyTorch's product of one bfloat16 row reads its weight at half the speed of such a loop. Activations are rounded to memory
first: the compiler would repeat in every output what they are computed from.

All that lies between two attentions is then one kernel and one wake-up of the OpenMP threads. int8 is summed over
four quarters of the weight at once: with one, the loop is slower than memory.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

from pagegraph.compiler.passes.graph.patterns import call, is_call, rewrite, shape

LINEAR = torch._C._nn.linear  # as TorchDynamo writes functional.linear down
NARROW = (torch.bfloat16, torch.float16)


def one_row_linears(module: GraphModule) -> int:
    """Rewrite the graph in place; returns the number of products rewritten."""
    return rewrite(module, _summed)


def _summed(node: Node) -> bool:
    if not (is_call(node, LINEAR) or is_call(node, functional.linear)):
        return False
    hidden_states, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    dtype = node.meta["example_value"].dtype
    if dtype not in NARROW or any(not isinstance(size, int) or size != 1 for size in shape(node)[:-1]):
        return False
    with node.graph.inserting_before(node):
        summed = _one_row(node.graph, hidden_states, weight, bias, dtype, shape(node))
    node.replace_all_uses_with(summed)
    return True


def _one_row(
    graph: Graph, hidden_states: Node, weight: Node, bias: Node | None, dtype: torch.dtype, size: torch.Size
) -> Node:
    """states [1, .., K] @ weight [N, K].T + bias [N] -> [1, .., N], summed in float32."""
    row = call(graph, "float", call(graph, "reshape", call(graph, torch.ops.pagegraph.in_memory, hidden_states), -1))
    out = call(graph, "sum", call(graph, operator.mul, call(graph, "float", weight), row), -1)
    if bias is not None:
        out = call(graph, operator.add, out, call(graph, "float", bias))
    return call(graph, "view", call(graph, "to", out, dtype), tuple(size))
