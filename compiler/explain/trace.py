"""The graph that a model's forward is traced to, on the meta device, and what a step of any size costs in it.

The graph is the one that the engine compiles, before the passes over the graph: they change how it is computed, not how much. Knows
no device.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from pagegraph.compiler.inductor.compile import compile_forward
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


@dataclass(slots=True)
class Traced:
    """A model's graphs as traced, and the callable that runs them with the caches that they were traced with."""

    forward: Callable[..., Forwarded]
    paged_model: PagedModel
    state: DeviceState
    graphs: list[GraphModule]

    def costs(self, step: StepRows, seqs: int) -> StepTotals:
        """Of a step with these rows, padded to `seqs` sequences."""
        return costs(self.forward, self.paged_model, self.state, step, seqs)


def trace(paged_model: PagedModel, state: DeviceState, steps: Iterable[StepInput]) -> Traced:
    """Trace `paged_model` on the meta device for each kind of step, as the engine compiles it for them."""
    traced: list[GraphModule] = []

    def keep(module: GraphModule, inputs: list[Any]) -> Callable:
        traced.append(GraphModule(module, copy.deepcopy(module.graph)))
        return module.forward

    forward = compile_forward(paged_model, (), keep)
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
) -> StepTotals:
    """What the calls of a forward cost, traced or not, run on the meta device."""
    inputs = meta_inputs(state, int(step.rows.sum()), seqs)
    weights = [*paged_model.parameters(), *paged_model.buffers()]
    sharding = paged_model.sharding
    spread = sharding.ranks.size if sharding is not None and sharding.ranks.expert_parallel else 1
    watch = _Costs({one.untyped_storage()._cdata for one in weights if one.dim() > 1}, step, spread)
    with torch.no_grad(), watch:
        forward(*inputs, *state.caches)
    return dict(watch.totals)


class _Costs(TorchDispatchMode):
    """Adds up the costs of the calls within it. `weights`: storages; spread: as `cost_of` has it."""

    def __init__(self, weights: set[int], step: StepRows, spread: int) -> None:
        super().__init__()
        self._spread = spread
        self.totals: StepTotals = defaultdict(Totals)
        self._weights, self._step = weights, step

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(function in counted for counted in (PRODUCTS, ATTENTION, STATES)):
            with self:
                parts = function.decompose(*args, **kwargs)  # of a composite one; the parts come here again
            return function(*args, **kwargs) if parts is NotImplemented else parts
        out = function(*args, **kwargs)
        names = [one.name for one in function._schema.arguments]
        arguments = dict(zip(names, args)) | kwargs
        tensors = torch.utils._pytree.tree_leaves(list(arguments.values()))
        weights = [
            one
            for one in tensors
            if isinstance(one, torch.Tensor) and one.dim() > 1 and one.untyped_storage()._cdata in self._weights
        ]
        cost = cost_of(
            function, arguments, out[0] if isinstance(out, tuple) else out, weights, self._step, self._spread
        )
        if cost is not None:
            self.totals[cost.kind].add(cost)
        return out


def decodes(seqs: int, context: int) -> StepRows:
    """A token each of so many sequences, `context` tokens long with it."""
    return StepRows(np.ones(seqs, np.int64), np.full(seqs, context, np.int64))


def prompts(tokens: int, context: int) -> StepRows:
    """So many tokens of prompts of `context` tokens: whole ones, or the end of one."""
    whole, rest = divmod(tokens, context)
    rows = [context] * whole + [rest] * (rest > 0)
    lengths = [context] * (whole if whole else 0) + ([context] if rest and not whole else [rest] * (rest > 0))
    return StepRows(np.array(rows, np.int64), np.array(lengths, np.int64))
