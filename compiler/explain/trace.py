"""The graph that a model's forward is traced to, on the meta device, and what a step of any size costs in it.

The graph is the one that the engine compiles, before the passes over the graph: they change how it is computed, not how much. Knows
no device.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagegraph.compiler.inductor.compile import GraphPass, compile_forward
from pagegraph.compiler.model.paged import Forwarded, PagedModel
from pagegraph.compiler.step.forward import mark_dynamic
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.state import DeviceState
from pagegraph.kernels.costs import ATTENTION, PRODUCTS, STATES, Cost, Kind, StepRows, cost_of

META = torch.device("meta")


@dataclass(slots=True)
class Totals:
    """Sums over the calls of a step."""

    flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    narrow_flops: int = 0  # of `flops`: by weights of 8 bits or fewer
    calls: int = 0

    def add(self, cost: Cost) -> None:
        self.flops += cost.flops
        self.weight_bytes += cost.weight_bytes
        self.cache_bytes += cost.cache_bytes
        self.narrow_flops += cost.flops if cost.narrow else 0
        self.calls += 1

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


StepTotals = dict[Kind, Totals]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a step: of an op that is counted, of another op of ours, or a run of the compiler's own loops, all one.

    `moved`: bytes of activations that it reads and writes, beside weights, keys, values and states.
    """

    op: str  # name of ours; "" what the compiler writes
    moved: int
    cost: Cost | None = None
    rows: int = 0  # of x, of a product
    columns: int = 0
    pairs: int = 0  # of a row and its choice, of experts
    matrices: tuple[tuple[int, ...], ...] = ()  # sizes as they are stored, without scales
    narrow: bool = False  # x may be multiplied as numbers of 8 bits


@dataclass(slots=True)
class Traced:
    """A model's graphs as traced, and the callable that runs what the passes made of them, with the caches that they were
    traced with."""

    forward: Callable[..., Forwarded]
    paged_model: PagedModel
    state: DeviceState
    graphs: list[GraphModule]

    def costs(self, step: StepRows, seqs: int) -> tuple[StepTotals, list[Call]]:
        """Of a step with these rows, padded to `seqs` sequences."""
        return costs(self.forward, self.paged_model, self.state, step, seqs)


def trace(
    paged_model: PagedModel, state: DeviceState, steps: Iterable[StepInput], passes: Sequence[GraphPass] = ()
) -> Traced:
    """Trace `paged_model` on the meta device for each kind of step, as the engine compiles it for them.

    `graphs` are kept as they are before the passes.
    """
    traced: list[GraphModule] = []

    def keep(module: GraphModule) -> int:
        traced.append(GraphModule(module, copy.deepcopy(module.graph)))
        return 0

    forward = compile_forward(paged_model, (keep, *passes), lambda module, inputs: module.forward)
    for step in steps:
        inputs = meta_inputs(state, step.num_tokens, 1 if step.num_tokens == 1 else max(step.num_seqs, 2))
        mark_dynamic(*inputs)
        with torch.inference_mode():
            forward(*inputs, *state.caches)
    return Traced(forward, paged_model, state, traced)


def meta_inputs(state: DeviceState, tokens: int, seqs: int) -> tuple[torch.Tensor, ...]:
    """The tensors of `PagedModel.forward`, less the caches, for a padded step."""

    def one(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device=META)

    return (
        one(tokens), one(tokens), one(tokens), one(seqs, state.max_blocks), one(seqs + 1), one(seqs),
        one(seqs), one(seqs, dtype=torch.int64),
    )  # fmt: skip


def costs(
    forward: Callable[..., Forwarded], paged_model: PagedModel, state: DeviceState, step: StepRows, seqs: int
) -> tuple[StepTotals, list[Call]]:
    """What the calls of a forward cost in all, traced or not, and the calls, run on the meta device."""
    inputs = meta_inputs(state, int(step.rows.sum()), seqs)
    weights = [*paged_model.parameters(), *paged_model.buffers()]
    sharding = paged_model.sharding
    spread = sharding.ranks.size if sharding is not None and sharding.ranks.expert_parallel else 1
    held = {one.untyped_storage()._cdata for caches in state.caches for one in caches}
    watch = _Costs({one.untyped_storage()._cdata for one in weights if one.dim() > 1}, held, step, spread)
    with torch.no_grad(), watch:
        forward(*inputs, *state.caches)
    watch.end_run()
    return dict(watch.totals), watch.calls


class _Costs(TorchDispatchMode):
    """Lists the calls within it and adds up their costs. `weights`, `held`: storages, of matrices and of caches; spread: as
    `cost_of` has it."""

    def __init__(self, weights: set[int], held: set[int], step: StepRows, spread: int) -> None:
        super().__init__()
        self._spread = spread
        self.totals: StepTotals = defaultdict(Totals)
        self.calls: list[Call] = []
        self._weights, self._held, self._step = weights, held, step
        self._run: dict[
            int, int
        ] = {}  # storage -> bytes, of what the compiler's loops have written since the last call
        self._read = self._written = 0  # by these loops: in all, and last

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = any(function in table for table in (PRODUCTS, ATTENTION, STATES))
        if not counted:
            with self:
                parts = function.decompose(*args, **kwargs)  # of a composite one; the parts come here again
            if parts is not NotImplemented:
                return parts
        out = function(*args, **kwargs)
        names = [one.name for one in function._schema.arguments]
        arguments = dict(zip(names, args)) | kwargs
        tensors = [one for one in tree_leaves(list(arguments.values())) if isinstance(one, torch.Tensor)]
        weights = [one for one in tensors if one.dim() > 1 and one.untyped_storage()._cdata in self._weights]
        results = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        cost = None
        if counted:
            cost = cost_of(
                function, arguments, out[0] if isinstance(out, tuple) else out, weights, self._step, self._spread
            )
        if cost is not None:
            self.totals[cost.kind].add(cost)
        self._list(function, arguments, tensors, results, cost, weights)
        return out

    def _list(
        self, function: Any, arguments: dict[str, Any], tensors: list[Tensor], results: list[Tensor],
        cost: Cost | None, weights: list[Tensor],
    ) -> None:  # fmt: skip
        """As a call, or as part of a run of loops; views are nothing."""
        given = {one.untyped_storage()._cdata: one for one in tensors}
        new = {one.untyped_storage()._cdata: one for one in results if one.untyped_storage()._cdata not in given}
        read = {at: one.nbytes for at, one in given.items() if at not in self._weights | self._held}
        ours = function.namespace == "pagegraph"
        if cost is None and not ours:
            if new and given:
                self._read += sum(size for at, size in read.items() if at not in self._run)
                self._written = sum(one.nbytes for one in new.values())
                self._run |= {at: one.nbytes for at, one in new.items()}
            return
        self.end_run()
        moved = sum(read.values()) + sum(one.nbytes for one in new.values())
        name = function._schema.name.partition("::")[2] if ours else ""
        if cost is None or cost.kind in ("attention", "states"):
            self.calls.append(Call(name, moved, cost))
            return
        x = next(one for one in tensors if one.dim() > 1 and one.untyped_storage()._cdata in read)
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        pairs = arguments["chosen"].numel() if "chosen" in arguments else rows
        matrices = [one for one in weights if one.element_size() == 1] or weights
        sizes = tuple(tuple(one.shape) for one in matrices)
        narrow = cost.narrow and bool(arguments.get("quantize_x"))
        self.calls.append(Call(name, moved, cost, rows, columns, pairs, sizes, narrow))

    def end_run(self) -> None:
        """What the compiler's loops have done since the last call becomes one."""
        if self._run:
            self.calls.append(Call("", self._read + self._written))
        self._run, self._read, self._written = {}, 0, 0


def decodes(seqs: int, context: int) -> StepRows:
    """A token each of so many sequences, `context` tokens long with it."""
    return StepRows(np.ones(seqs, np.int64), np.full(seqs, context, np.int64))


def prompts(tokens: int, context: int) -> StepRows:
    """So many tokens of prompts of `context` tokens: whole ones, or the end of one."""
    whole, rest = divmod(tokens, context)
    rows = [context] * whole + [rest] * (rest > 0)
    lengths = [context] * (whole if whole else 0) + ([context] if rest and not whole else [rest] * (rest > 0))
    return StepRows(np.array(rows, np.int64), np.array(lengths, np.int64))
