"""Guard-free calls: from the second step of a kind on, the compiled graph of the forward is called past Dynamo.

At every call Dynamo fetches hundreds of inputs from the modules and writes back what the forward set: 0.8 ms on a CPU,
a tenth of a step of one small sequence. All inputs but a step's own are the same from call to call and are kept with
the graph. Guards on sizes are evaluated at each call, and so is whether the KV caches are the same tensors; if one
fails, the call goes through Dynamo. Knows no compiler, only what it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Graph = Callable[..., Sequence[torch.Tensor]]
Inputs = tuple[Any, ...]  # those of `PagedModel.forward`: a step's tensors, then lists of caches


class GuardFreeGraph:
    """A compiled graph and all of its inputs but a step's own."""

    def __init__(self, seen: _Call, inputs: Inputs, out: Any) -> None:
        """`seen`: the call of the graph that the forward, called with `inputs`, ended in and returned `out` of."""
        traced, given = seen.traced, seen.given
        self._graph = seen.graph
        at = {id(one): place for place, one in enumerate(seen.results)}
        self._one = isinstance(out, torch.Tensor)
        self._results = [None if one is None else at[id(one)] for one in ((out,) if self._one else out)]
        self._inputs = list(given)
        self._caches = [one for one in inputs if isinstance(one, list)]
        own = {id(one): at for at, one in enumerate(inputs) if isinstance(one, torch.Tensor)}
        self._tensors = [(at, own[id(one)]) for at, one in enumerate(given) if id(one) in own]
        self._fixed = [
            (tensor, dim, size)
            for at, tensor in self._tensors
            for dim, size in enumerate(traced[at].shape)
            if not isinstance(size, torch.SymInt)
        ]
        self._symbols = [at for at, one in enumerate(traced) if isinstance(one, torch.SymInt)]
        self._sizes = [(at, *origin) for at in self._symbols if (origin := self._origin(traced[at], traced))]
        self._guards = None
        if self._symbols:
            self._shapes = traced[self._symbols[0]].node.shape_env
            guards = self._shapes.produce_guards_expression([traced[at] for at in self._symbols])
            if guards:  # compiled once, evaluated in each step
                self._guards = compile(guards, "<sizes>", "eval")

    def run(self, inputs: Inputs) -> Any:
        """What the forward returns, one tensor or a tuple; None where a guard fails."""
        if any(inputs[tensor].shape[dim] != size for tensor, dim, size in self._fixed):
            return None
        values = self._inputs.copy()
        for at, tensor, dim in self._sizes:
            values[at] = inputs[tensor].shape[dim]
        if self._guards and not self._shapes.evaluate_guards_expression(
            self._guards, [values[at] for at in self._symbols]
        ):
            return None
        if any(now is not then for now, then in zip((one for one in inputs if isinstance(one, list)), self._caches)):
            return None
        for at, tensor in self._tensors:
            values[at] = inputs[tensor]
        results = self._graph(*values)
        out = tuple(None if at is None else results[at] for at in self._results)
        return out[0] if self._one else out

    def _origin(self, symbol: torch.SymInt, traced: Sequence[Any]) -> tuple[int, int] | None:
        """(index of the step's tensor, dimension) that `symbol` is the size of; None where it is of a kept input."""
        for at, tensor in self._tensors:
            for dim, size in enumerate(traced[at].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                    return tensor, dim
        return None


class _Call(NamedTuple):
    """One call of a graph: its inputs as traced, sizes as symbols, its actual inputs, and what it gave."""

    graph: Graph
    traced: Sequence[Any]
    given: Sequence[Any]
    results: Sequence[torch.Tensor]


class _Seen(threading.local):
    """The call of a graph that a call through Dynamo ended in: one a thread."""

    call: _Call | None = None


class Forward:
    """The compiled forward; `compile_graph(module, traced inputs)` is called for each graph that Dynamo traces."""

    def __init__(self, model: torch.nn.Module, compile_graph: Callable[..., Graph], **options: Any) -> None:
        self._compile_graph = compile_graph
        self._traced = torch.compile(model, fullgraph=True, backend=self._backend, **options)
        self._graphs: dict[tuple[bool, ...], GuardFreeGraph] = {}
        self._seen = _Seen()

    def __call__(self, *inputs: Any) -> Any:
        # A size of one is a constant to the compiler, so such steps have graphs of their own.
        kind = tuple(size == 1 for one in inputs if isinstance(one, torch.Tensor) for size in one.shape)
        known = self._graphs.get(kind)
        out = None if known is None else known.run(inputs)
        if out is None:
            self._seen.call = None
            for cache in (cache for one in inputs if isinstance(one, list) for cache in one):
                torch._dynamo.mark_static(cache)  # or a process's second model would get symbols for their sizes
            out = self._traced(*inputs)
            if self._seen.call is not None:
                self._graphs[kind] = GuardFreeGraph(self._seen.call, inputs, out)
                self._seen.call = None  # it holds tensors of a step
        return out

    def _backend(self, module: torch.fx.GraphModule, traced: list[Any]) -> Graph:
        symbolic = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        graph = self._compile_graph(module, traced)

        def run(*given: Any) -> Sequence[torch.Tensor]:
            results = graph(*given)
            self._seen.call = _Call(graph, symbolic, given, results)
            return results

        return run
