"""Guard-free calls: from the second step of a kind on, the compiled graph of the forward is called past Dynamo.

At every call Dynamo fetches hundreds of inputs from the modules and writes back what the forward set: 0.8 ms on a CPU,
a tenth of a step of one small sequence. All inputs but a step's own are the same from call to call and are kept with
the graph. Guards on sizes are evaluated at each call, and so is whether the KV caches are the same tensors; if one
fails, the call goes through Dynamo.

A graph may come from an earlier process: what it is called with is then named instead of seen, and Dynamo does not run
at all. Knows no compiler, only what it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

Graph = Callable[..., Sequence[torch.Tensor]]
Inputs = tuple[Any, ...]  # those of `PagedModel.forward`: a step's tensors, then lists of caches
Kind = tuple[bool, ...]  # of a step: which sizes of its tensors are one


@dataclass(frozen=True, slots=True)
class CallPlan:
    """How a graph is called: which of its inputs are a step's, what holds for them, and what becomes of its results.

    Plain values: with `kept` named, a plan serves in another process.
    """

    tensors: list[tuple[int, int]]  # (input of the graph, index among the step's inputs)
    sizes: list[tuple[int, int, int]]  # (input, index among the step's inputs, dimension that it is the size of)
    fixed: list[tuple[int, int, int]]  # (index among the step's inputs, dimension, the size it must have)
    symbols: list[int]  # inputs that are sizes, in the order in which `guards` names them
    guards: str  # an expression of Python; empty where there are none
    results: list[int | None]  # of each output of the forward, the graph's result that it is
    one: bool  # the forward returns one tensor, not a tuple


class NamedInputs(NamedTuple):
    """The inputs of a graph that are kept, by name: parameters and buffers, caches, plain numbers."""

    size: int  # inputs of the graph
    tensors: dict[int, str]  # input -> name of a parameter or buffer
    caches: dict[int, tuple[int, int]]  # input -> (which list of caches, place in it)
    values: dict[int, int | float | bool]


class StoredGraph(NamedTuple):
    """All of a compiled graph that another process needs to call it, given the same model."""

    kind: Kind
    plan: CallPlan
    inputs: NamedInputs
    code: bytes  # as `Compiler.save` gives it


class NotStorable(Exception):
    """A graph depends on something that has no name."""


class GuardFreeGraph:
    """A compiled graph and all of its inputs but a step's own."""

    def __init__(self, graph: Graph, plan: CallPlan, kept: Sequence[Any], caches: Sequence[list[torch.Tensor]]) -> None:
        """`kept`: an input for every one of the graph's, those of a step replaced at each call."""
        self.graph, self.plan = graph, plan
        self._inputs, self._caches = list(kept), list(caches)
        # Compiled once, evaluated in each step.
        self._guards = compile(plan.guards, "<sizes>", "eval") if plan.guards else None
        self._shapes = ShapeEnv()

    def run(self, inputs: Inputs) -> Any:
        """What the forward returns, one tensor or a tuple; None where a guard fails."""
        plan = self.plan
        if any(inputs[tensor].shape[dim] != size for tensor, dim, size in plan.fixed):
            return None
        values = self._inputs.copy()
        for at, tensor, dim in plan.sizes:
            values[at] = inputs[tensor].shape[dim]
        if self._guards and not self._shapes.evaluate_guards_expression(
            self._guards, [values[at] for at in plan.symbols]
        ):
            return None
        if any(now is not then for now, then in zip((one for one in inputs if isinstance(one, list)), self._caches)):
            return None
        for at, tensor in plan.tensors:
            values[at] = inputs[tensor]
        results = self.graph(*values)
        out = tuple(None if at is None else results[at] for at in plan.results)
        return out[0] if plan.one else out

    def named_inputs(self, model: torch.nn.Module) -> NamedInputs:
        """What it keeps, by name. Raises NotStorable where something has none."""
        names = {id(tensor): name for name, tensor in _tensors(model)}
        cached = {id(one): (which, at) for which, caches in enumerate(self._caches) for at, one in enumerate(caches)}
        found = NamedInputs(len(self._inputs), {}, {}, {})
        given = {at for at, _ in self.plan.tensors} | {at for at, _, _ in self.plan.sizes}
        for at, one in enumerate(self._inputs):
            if at in given:
                continue
            if id(one) in names:
                found.tensors[at] = names[id(one)]
            elif id(one) in cached:
                found.caches[at] = cached[id(one)]
            elif isinstance(one, (bool, int, float)):
                found.values[at] = one
            else:
                raise NotStorable(f"input {at} of the graph, {type(one).__name__}, is no parameter or buffer")
        return found

    @property
    def cache_inputs(self) -> list[int]:
        """Which inputs of the graph are caches."""
        cached = {id(one) for caches in self._caches for one in caches}
        return [at for at, one in enumerate(self._inputs) if id(one) in cached]


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def kept_inputs(
    named: NamedInputs, model: torch.nn.Module, caches: Sequence[list[torch.Tensor]]
) -> list[torch.Tensor | int | float | bool | None]:
    """The inputs that `named` stands for. Raises KeyError or IndexError where the model has no such one."""
    tensors, kept = dict(_tensors(model)), [None] * named.size
    for at, name in named.tensors.items():
        kept[at] = tensors[name]
    for at, (which, place) in named.caches.items():
        kept[at] = caches[which][place]
    for at, value in named.values.items():
        kept[at] = value
    return kept


class _Call(NamedTuple):
    """One call of a graph: its inputs as traced, sizes as symbols, its actual inputs, and what it gave."""

    graph: Graph
    traced: Sequence[Any]
    given: Sequence[Any]
    results: Sequence[torch.Tensor]
    only_handed_on: frozenset[int]  # inputs that the traced graph does nothing with but hand them to ops of ours

    def plan(self, inputs: Inputs, out: Any) -> CallPlan:
        """`inputs` and `out`: of the call of the forward that ended in this one."""
        at = {id(one): place for place, one in enumerate(self.results)}
        one = isinstance(out, torch.Tensor)
        own = {id(one): at for at, one in enumerate(inputs) if isinstance(one, torch.Tensor)}
        tensors = [(at, own[id(one)]) for at, one in enumerate(self.given) if id(one) in own]
        symbols = [at for at, one in enumerate(self.traced) if isinstance(one, torch.SymInt)]
        guards = ""
        if symbols:
            shapes = self.traced[symbols[0]].node.shape_env
            guards = shapes.produce_guards_expression([self.traced[at] for at in symbols]) or ""
        return CallPlan(
            tensors=tensors,
            sizes=[(at, *origin) for at in symbols if (origin := self._origin(at, tensors))],
            fixed=[
                (tensor, dim, size)
                for at, tensor in tensors
                for dim, size in enumerate(self.traced[at].shape)
                if not isinstance(size, torch.SymInt)
            ],
            symbols=symbols,
            guards=guards,
            results=[None if one is None else at[id(one)] for one in ((out,) if one else out)],
            one=one,
        )

    def _origin(self, symbol: int, tensors: list[tuple[int, int]]) -> tuple[int, int] | None:
        """(index of the step's tensor, dimension) that a symbol is the size of; None where it is of a kept input."""
        for at, tensor in tensors:
            for dim, size in enumerate(self.traced[at].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == self.traced[symbol].node.expr:
                    return tensor, dim
        return None


class _Seen(threading.local):
    """The call of a graph that a call through Dynamo ended in: one a thread."""

    call: _Call | None = None


class Forward:
    """The compiled forward; `compile_graph(module, traced inputs)` is called for each graph that Dynamo traces."""

    def __init__(self, model: torch.nn.Module, compile_graph: Callable[..., Graph], **options: Any) -> None:
        self._model = model
        self._compile_graph = compile_graph
        self._traced = torch.compile(model, fullgraph=True, backend=self._backend, **options)
        self._graphs: dict[Kind, GuardFreeGraph] = {}
        self._handed_on: dict[Kind, bool] = {}  # whether its caches are only handed on to ops of ours
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
            if (call := self._seen.call) is not None:
                caches = [one for one in inputs if isinstance(one, list)]
                graph = GuardFreeGraph(call.graph, call.plan(inputs, out), call.given, caches)
                self._graphs[kind] = graph
                self._handed_on[kind] = call.only_handed_on.issuperset(graph.cache_inputs)
                self._seen.call = None  # it holds tensors of a step
        return out

    def stored(self, save: Callable[[Graph], bytes], any_blocks: bool) -> list[StoredGraph]:
        """Its graphs as another process can take them up; `save` gives a compiled graph's bytes.

        any_blocks: they are to serve caches of any number of blocks. Raises NotStorable where a graph cannot.
        """
        if any_blocks and not all(self._handed_on.values()):
            raise NotStorable("the graph reads the sizes of the KV caches")
        return [
            StoredGraph(kind, one.plan, one.named_inputs(self._model), save(one.graph))
            for kind, one in self._graphs.items()
        ]

    def restore(
        self, stored: Sequence[StoredGraph], load: Callable[[bytes], Graph], caches: Sequence[list[torch.Tensor]]
    ) -> None:
        """Take up graphs of another process over these caches; `load` is the inverse of `stored`'s `save`."""
        self._graphs |= {
            one.kind: GuardFreeGraph(load(one.code), one.plan, kept_inputs(one.inputs, self._model, caches), caches)
            for one in stored
        }

    def _backend(self, module: torch.fx.GraphModule, traced: list[Any]) -> Graph:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        symbolic = [node.meta["example_value"] for node in placeholders]
        only_handed_on = frozenset(
            at for at, node in enumerate(placeholders) if all(_is_ours(user) for user in node.users)
        )
        graph = self._compile_graph(module, traced)

        def run(*given: Any) -> Sequence[torch.Tensor]:
            results = graph(*given)
            self._seen.call = _Call(graph, symbolic, given, results, only_handed_on)
            return results

        return run


def _is_ours(node: torch.fx.Node) -> bool:
    target = node.target
    packet = getattr(target, "overloadpacket", target)
    return node.op == "call_function" and str(packet).startswith("pagegraph.")
