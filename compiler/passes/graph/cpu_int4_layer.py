"""Graph pass for the CPU: two products of 4-bit values with residual addition and norm between them, on one row, become one op.

So do two such pairs in a row, which is all between two attentions: a call costs as much as a short product, and so does waking
a team of threads for it. Knows FX graphs and the form that `Int4Packed` has in them; knows no models.

One team of threads runs the four GEMVs with a barrier after each; what lies between them every thread computes for
itself, which costs less than a barrier. Blocks are halved by columns, because a layer has odd numbers of them. Where
the CPU has `vdpbf16ps` and VBMI, 4-bit values are looked up as bfloat16 and pairs of columns multiplied at once: the
same sums with half the instructions.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from pagegraph.compiler.passes.graph.patterns import call, gated_of, is_call, is_method, normed_of, rewrite, shape
from pagegraph.kernels.quant import cpu_int4

ops = torch.ops.pagegraph
PAIR = 7  # tensors of a pair: packed, pairs, bias of each product, and the norm


class Product(NamedTuple):
    """out [1, .., N] of `rows` [1, K]; nothing else reads what lies between them."""

    rows: Node
    packed: Node
    pairs: Node
    group: int
    bias: Node | None
    out: Node

    @property
    def tensors(self) -> list[Node]:
        return [self.packed, self.pairs, self.pairs if self.bias is None else self.bias]

    @property
    def sizes(self) -> list[int]:
        return [shape(self.rows)[1], shape(self.packed)[0], self.group]


def fuse_int4_layer(module: GraphModule) -> int:
    """Rewrite every such pair of `module`; returns how many."""
    pairs = rewrite(module, lambda node: _pair(module.graph, node))
    if pairs:
        rewrite(module, lambda node: _join(module.graph, node))
    return pairs


def _pair(graph: Graph, node: Node) -> bool:
    second = _product(node)
    if second is None or not is_method(second.rows, "flatten", 0, -2) or len(second.rows.users) > 1:
        return False
    rows = second.rows.args[0]
    normed = normed_of(rows)
    if normed is None or normed.rounds_once or len(rows.users) > 1 or not is_call(normed.source, operator.add):
        return False
    total = normed.source
    first = next((one for one in map(_product_of, total.args) if one is not None), None)
    residual = next((one for one in total.args if first is None or one is not first.out), None)
    if first is None or not isinstance(residual, Node) or shape(residual) != shape(total):
        return False
    out = second.out
    gate = _gate(out)
    biased = (first.bias is not None) + 2 * (second.bias is not None)
    numbers = [2, biased, 2 * (gate is not None), *first.sizes, *second.sizes]
    # In the sum's place, where all that is no parameter is known.
    with graph.inserting_before(total):
        tensors = [*first.tensors, *second.tensors, normed.weight]
        hidden_states = call(graph, "flatten", residual, 0, -2)
        layer = call(graph, ops.int4_packed_layer, first.rows, hidden_states, tensors, numbers, [normed.eps])
        _split(graph, layer, total, gate or out)
    return True


def _join(graph: Graph, layer: Node) -> bool:
    """Two fused layers, the first of whose results only the second one reads."""
    if not is_call(layer, ops.int4_packed_layer):
        return False
    x, residual, tensors, numbers, eps = layer.args
    before = _source(x, 1)
    if before is None or before is not _source(residual, 0) or len(before.args[2]) > PAIR:
        return False
    x, residual, earlier, sizes, earlier_eps = before.args
    masks = [one | other << 2 for one, other in zip(sizes[1:3], numbers[1:3])]
    with graph.inserting_before(before):
        arguments = ([*earlier, *tensors], [4, *masks, *sizes[3:], *numbers[3:]], [*earlier_eps, *eps])
        joined = call(graph, ops.int4_packed_layer, x, residual, *arguments)
    layer.replace_all_uses_with(joined)
    return True


def _split(graph: Graph, layer: Node, total: Node, out: Node) -> None:
    """Put the two parts of a fused layer's result in the place of what they were."""
    size = shape(total)[-1]
    for old, part in ((total, slice(0, size)), (out, slice(size, None))):
        new = call(graph, "view", call(graph, operator.getitem, layer, (slice(None), part)), tuple(shape(old)))
        old.replace_all_uses_with(new)


def _source(rows: Node, part: int) -> Node | None:
    """The fused layer of whose result `rows` is the sum (0) or the rest (1), where nothing else reads it."""
    if not is_method(rows, "flatten", 0, -2) or rows.args[0].target != "view":
        return None
    taken = rows.args[0].args[0]
    if not is_call(taken, operator.getitem) or not is_call(taken.args[0], ops.int4_packed_layer):
        return None
    alone = all(len(one.users) == 1 for one in (rows, rows.args[0], taken))
    return taken.args[0] if alone and (taken.args[1][1].start > 0) == part else None


def _product(node: Node) -> Product | None:
    """The product that begins with this call."""
    if not is_call(node, ops.int4_packed_linear):
        return None
    rows, packed, pairs, group = node.args
    if not cpu_int4.takes(node.meta["example_value"].dtype, shape(node)[0]):
        return None
    bias, out = None, _only_user(node)
    if is_call(out, operator.add) and out.args[0] is node and getattr(out.args[1], "op", "") == "placeholder":
        bias, out = out.args[1], _only_user(out)
    if out is None or not (out.op == "call_method" and out.target == "unflatten" and out.args[1] == 0):
        return None
    return Product(rows, packed, pairs, group, bias, out)


def _product_of(out: Node) -> Product | None:
    """The product that ends with this node, which one other reads."""
    if not isinstance(out, Node) or out.target != "unflatten" or len(out.users) > 1:
        return None
    node = out.args[0]
    product = _product(node.args[0] if is_call(node, operator.add) else node)
    return product if product is not None and product.out is out else None


def _gate(out: Node) -> Node | None:
    """silu(first half) * second half of `out`, where nothing else reads it."""
    halves = _only_user(out)
    gates = {user for part in halves.users for user in part.users} if halves is not None else ()
    gates = {_only_user(user) if is_call(user, torch.nn.functional.silu) else user for user in gates}
    return next(iter(gates)) if len(gates) == 1 and gated_of(next(iter(gates))) is out else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
