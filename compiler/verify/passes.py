"""Each pass against what was before it: a few steps of known tokens, run before and behind every rewrite.

Passes over modules are watched while the model is built, on a small KV cache of their own. Passes over the graph run one
after the other on the graph that Dynamo traces, each version of which computes the same steps; the compiled forward is the
last of them. Knows steps and graphs; knows no pass by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from pagegraph.compiler.build import BuiltModel, LoadedModel
from pagegraph.compiler.inductor.compile import GraphPass, compile_forward
from pagegraph.compiler.model.paged import Forwarded
from pagegraph.compiler.passes.registry import PassReport
from pagegraph.compiler.step.caches import Caches
from pagegraph.compiler.step.forward import mark_dynamic
from pagegraph.compiler.verify.difference import Positions, joined, positions_of
from pagegraph.compiler.verify.steps import HandSteps, over_cache_of

BLOCK = 16  # tokens, of the small cache
LENGTHS = (11, 5, 8, 6, 7)  # tokens of the first, ragged step
SINGLES = 4  # steps of a single token behind it
INDUCTOR = "Inductor"


@dataclass(slots=True)
class PassCheck:
    """A pass, the places that it changed, and how far the steps are from those before it. `kind`: modules or graph."""

    kind: str
    name: str
    changes: int | None  # None: the compiler does not say
    found: Positions


@dataclass(slots=True)
class ModulePasses:
    """`watch` of `build_model`: what each pass over modules changed."""

    token_ids: Sequence[int]
    checks: list[PassCheck] = field(default_factory=list)
    _before: torch.Tensor | None = None

    def __call__(self, model: LoadedModel, report: PassReport | None) -> None:
        logits = self._run(model)
        if report is not None:
            assert self._before is not None
            found = positions_of(self._before, logits)
            self.checks.append(PassCheck("modules", report.name, report.changes, found))
        self._before = logits

    @torch.inference_mode()
    def _run(self, model: LoadedModel) -> torch.Tensor:
        """Logits [R, vocab] of every token of the steps."""
        paged = model.paged_model
        device = next(paged.parameters()).device
        width = -(-(max(LENGTHS) + SINGLES) // BLOCK)
        blocks = 1 + width * len(LENGTHS)
        caches = Caches.of(
            paged.layouts, paged.states, num_blocks=blocks, block_size=BLOCK, num_slots=len(LENGTHS),
            dtype=model.cache_dtype, activation_dtype=model.dtype, device=device,
        )  # fmt: skip
        steps = HandSteps(
            [n + SINGLES for n in LENGTHS], num_blocks=blocks, block_size=BLOCK, width=width, device=device
        )
        found = []
        for tokens in _tokens(self.token_ids, LENGTHS):
            rows = torch.arange(sum(map(len, tokens)))
            found.append(paged(*steps.step(tokens, rows), *caches)[0].float().cpu())
        return torch.cat(found)


def _tokens(token_ids: Sequence[int], lengths: Sequence[int]) -> list[list[list[int]]]:
    """For each step the new tokens of each sequence: all of them begin, then all go on, then the first goes on alone."""
    stream = [token_ids[at % len(token_ids)] for at in range(sum(lengths) + len(lengths) + SINGLES)]

    def take(counts: Sequence[int]) -> list[list[int]]:
        return [[stream.pop(0) for _ in range(count)] for count in counts]

    alone = [1, *[0] * (len(lengths) - 1)]
    return [take(lengths), take([1] * len(lengths)), *(take(alone) for _ in range(SINGLES - 1))]


def _lengths(width: int) -> tuple[int, ...]:
    """So that tokens, sequences, one more, and the width of the tables are different numbers: the compiler takes equal
    sizes for one.
    """
    return LENGTHS if width not in (sum(LENGTHS), len(LENGTHS), len(LENGTHS) + 1) else LENGTHS[:3]


@torch.inference_mode()
def steps_by(
    built: BuiltModel, token_ids: Sequence[int], forward: Callable[..., Forwarded], mark: bool = False
) -> list[torch.Tensor]:
    """Logits [S, vocab] of each of a few steps of `forward` over the built model's cache.

    mark: their sizes as those of a compiled forward are.
    """
    state, found = built.step.state, []
    lengths = _lengths(state.max_blocks)
    steps = over_cache_of(built, [n + SINGLES for n in lengths])
    for tokens in _tokens(token_ids, lengths):
        inputs = steps.step(tokens)
        if mark:
            mark_dynamic(*inputs)
        found.append(forward(*inputs, *state.caches)[0].float().cpu())
    return found


def check_graph_passes(
    built: BuiltModel, graph_passes: Sequence[GraphPass], token_ids: Sequence[int]
) -> list[PassCheck]:
    """Of each pass, on every kind of graph that the steps need. The model is not changed."""
    names = [one.__name__ for one in graph_passes]
    changes: dict[str, int] = dict.fromkeys(names, 0)
    found: dict[str, list[Positions]] = {name: [] for name in names}

    def backend(module: GraphModule, inputs: list[Any]) -> Callable:
        versions = [_copied(module)]
        for name, graph_pass in zip(names, graph_passes):
            changes[name] += graph_pass(module)
            versions.append(_copied(module))
        logits = _logits_place(module)

        def run(*arguments: Any) -> Any:
            outputs = [version(*arguments) for version in versions]
            for name, before, behind in zip(names, outputs, outputs[1:]):
                found[name].append(positions_of(before[logits], behind[logits]))
            return outputs[0]

        return run

    torch._dynamo.reset()
    steps_by(built, token_ids, compile_forward(built.step.paged_model, (), backend), mark=True)
    torch._dynamo.reset()
    return [PassCheck("graph", name, changes[name], joined(found[name])) for name in names]


def check_compiled(built: BuiltModel, token_ids: Sequence[int]) -> PassCheck:
    """The compiled forward against the modules: passes over the graph and what the compiler makes of it."""
    both = [steps_by(built, token_ids, forward) for forward in (built.step.paged_model, built.step.forward)]
    found = joined([positions_of(before, behind) for before, behind in zip(*both)])
    return PassCheck("graph", INDUCTOR, None, found)


def _copied(module: GraphModule) -> GraphModule:
    return GraphModule(module, copy.deepcopy(module.graph))


def _logits_place(module: GraphModule) -> int:
    """Which of the graph's results are the logits: the two-dimensional one; hidden states have three."""
    (output,) = next(node for node in module.graph.nodes if node.op == "output").args
    return next(at for at, one in enumerate(output) if one.meta["example_value"].dim() == 2)
