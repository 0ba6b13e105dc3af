"""Forms that graph passes look for in the traced graph. Knows FX nodes; knows no pass."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional

VIEWS = ("view", "reshape", "flatten", "contiguous")


class Normed(NamedTuple):
    """rows = RMS norm of `source` over its last dimension, times `weight`."""

    source: Node
    weight: Node
    eps: float

    @property
    def rounds_once(self) -> bool:
        """Whether rows of 16 bits are rounded behind the product with the weight alone, which is in float32 then."""
        return self.weight.meta["example_value"].dtype != self.source.meta["example_value"].dtype


def normed_of(rows: Node) -> Normed | None:
    """rows = weight * (x * rsqrt(mean(x ** 2, -1, keepdim) + eps)).to(dtype) with x = source.to(float32), all of one dtype; or
    (weight * (..)).to(dtype), the weight in float32."""
    once = is_narrowing(rows)
    outer = rows.args[0] if once else rows
    if not is_call(outer, operator.mul):
        return None
    weight, product = outer.args
    if not (isinstance(weight, Node) and weight.op == "placeholder"):
        return None
    if not once:
        if not is_narrowing(product):
            return None
        product = product.args[0]
    scaled = _unit_of(product)
    if scaled is None or not is_method(wide := scaled[0], "to", torch.float32):
        return None
    if tuple(shape(weight)) != (shape(rows)[-1],):
        return None
    source, *others = (one.meta["example_value"].dtype for one in (wide.args[0], weight, rows))
    if others != [torch.float32 if once else source, source]:
        return None
    return Normed(uncast(wide.args[0]), weight, scaled[1])


def _unit_of(product: Node) -> tuple[Node, float] | None:
    """(x, eps) of x * rsqrt(mean(x ** 2, -1, keepdim) + eps)."""
    if not is_call(product, operator.mul):
        return None
    x, scale = product.args
    if not is_call(scale, torch.rsqrt):
        return None
    shifted = scale.args[0]
    if not is_call(shifted, operator.add) or not isinstance(shifted.args[1], float):
        return None
    mean = shifted.args[0]
    if not is_method(mean, "mean", -1) or mean.kwargs != {"keepdim": True}:
        return None
    squares = mean.args[0]
    return (x, shifted.args[1]) if is_method(squares, "pow", 2) and squares.args[0] is x else None


class GatedNorm(NamedTuple):
    """rows = RMS norm of groups of `source` with silu(`gate`), ahead of the norm or behind."""

    source: Node  # [1, T, G * size], or [1, T, G, size]
    gate: Node  # likewise
    weight: Node
    eps: float
    size: int  # of a group
    gate_first: bool


def gated_norm_of(rows: Node) -> GatedNorm | None:
    """rows = (norm(x) * silu(gate.to(float32))).to(dtype) with a norm as of `normed_of`; or (weight * y.to(dtype of x)).to(dtype) with y
    = z * rsqrt(mean(z ** 2, -1, keepdim) + eps), z = x.to(float32) * silu(gate.to(float32)) by groups of columns."""
    if not is_narrowing(rows) or not is_call(product := rows.args[0], operator.mul):
        return None
    left, right = product.args
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    if is_call(right, functional.silu):
        normed, gate = normed_of(left), _opened(right)
        if normed is None or gate is None or normed.rounds_once:
            return None
        source, gate = _by_heads(normed.source), _by_heads(gate)
        found = GatedNorm(source, gate, normed.weight, normed.eps, shape(normed.source)[-1], False)
    else:
        if left.op != "placeholder" or not is_narrowing(right):
            return None
        product = before(right.args[0], lambda node: is_call(node, operator.mul))
        scaled = None if product is None else _unit_of(product)
        opened = None if scaled is None else before(scaled[0], lambda node: is_call(node, operator.mul))
        if scaled is None or opened is None or not is_method(opened.args[0], "to", torch.float32):
            return None
        grouped, eps = scaled
        source, gate = opened.args[0].args[0], _opened(opened.args[1])
        if gate is None or right.args[1] != source.meta["example_value"].dtype:
            return None
        found = GatedNorm(source, gate, left, eps, shape(grouped)[-1], True)
        if tuple(shape(left)) != (shape(opened)[-1],):
            return None
    if gate.meta["example_value"].dtype != rows.args[1] or str(shape(source)) != str(shape(gate)):
        return None
    return found if len(shape(source)) == (3 if found.gate_first else 4) and shape(source)[0] == 1 else None


def _opened(gate: Node) -> Node | None:
    """x of silu(x.to(float32))."""
    if not is_call(gate, functional.silu) or len(gate.args) != 1 or not is_method(gate.args[0], "to", torch.float32):
        return None
    return gate.args[0].args[0]


def _by_heads(rows: Node) -> Node:
    """[1, T, G, size] of which rows [T * G, size] are a view; the rows where there is none."""
    return before(rows, lambda node: len(shape(node)) == 4 and shape(node)[-1] == shape(rows)[-1]) or rows


def before(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest wanted one of the node and what it is a view of."""
    while not wanted(node):
        if not is_view(node):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return node


def gated_of(node: Node) -> Node | None:
    """The product of which node = silu(first half) * second half."""
    if not is_call(node, operator.mul) or not all(isinstance(one, Node) for one in node.args):
        return None
    activated, up = node.args
    if not is_call(activated, functional.silu) or not is_call(up, operator.getitem, 1, 1):
        return None
    gate, halves = activated.args[0], up.args[0]
    if not is_call(gate, operator.getitem, 1, 0) or gate.args[0] is not halves:
        return None
    size = shape(node)[-1]
    return halves.args[0] if is_method(halves, "split", [size, size]) and halves.kwargs == {"dim": -1} else None


def call(graph: Graph, target: Callable | str, *arguments: Any) -> Node:
    """The node with its example value, without which the compiler's cache takes no call of a method."""
    values = map_arg(arguments, lambda node: node.meta["example_value"])
    if isinstance(target, str):
        node, value = graph.call_method(target, arguments), getattr(values[0], target)(*values[1:])
    else:
        node, value = graph.call_function(target, arguments), target(*values)
    node.meta["example_value"] = value
    return node


def is_call(node: Any, target: Any, *at: Any) -> bool:
    """A call of the function; `at`: (position, value) of an argument it must have."""
    if not (isinstance(node, Node) and node.op == "call_function" and node.target is target):
        return False
    return not at or node.args[at[0]] == at[1]


def is_method(node: Any, name: str, *arguments: Any) -> bool:
    """A call of the method with these further arguments."""
    return isinstance(node, Node) and node.op == "call_method" and node.target == name and node.args[1:] == arguments


def is_view(node: Any) -> bool:
    """The same values in another shape, where they are dense."""
    return isinstance(node, Node) and node.op == "call_method" and node.target in VIEWS


def is_narrowing(node: Any) -> bool:
    return (
        isinstance(node, Node) and node.target == "to" and len(node.args) == 2 and isinstance(node.args[1], torch.dtype)
    )


def uncast(node: Node) -> Node:
    """What `node` is a cast of to the dtype that it has already, which some models ask for in case."""
    while isinstance(node, Node) and node.op == "call_method" and node.target == "to":
        source: Any = node.args[0]
        if node.args[1:] or set(node.kwargs) != {"dtype"} or node.kwargs["dtype"] != source.meta["example_value"].dtype:
            break
        node = source
    return node


def shape(node: Node) -> torch.Size:
    return node.meta["example_value"].shape


def rewrite(module: GraphModule, replace: Callable[[Node], bool]) -> int:
    """Offer every node of the graph to `replace`; drop what that leaves without use -> how often it said yes.

    What had no use before stays: it is there for its effect, as an assignment into a slice is.
    """
    graph = module.graph
    effects = {node for node in graph.nodes if not node.users}
    changes = sum(replace(node) for node in list(graph.nodes))
    if changes:
        for node in reversed(graph.nodes):
            if not node.users and node not in effects and node.op != "placeholder":
                graph.erase_node(node)
        graph.lint()
        module.recompile()
    return changes
