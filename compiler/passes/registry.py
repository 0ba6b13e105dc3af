"""The passes over the loaded model, in the order they run.

Knows which setting switches each pass; knows nothing of what a pass does.

There are two kinds. Passes over modules run before tracing: merged q/k/v and gate/up, linears routed through the op,
rotary angles once a step. Passes over the traced graph join rotation, norm and KV write to attention, and norms,
residuals and gates to the linears beside them. A graph that does not match the known pattern exactly is left as it
was; the tests compare every architecture with and without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.graph.cpu_gemv import one_row_linears
from pagegraph.compiler.passes.graph.cpu_int4_layer import fuse_int4_layer
from pagegraph.compiler.passes.graph.fuse_linears import fuse_linears
from pagegraph.compiler.passes.graph.fuse_norms import fuse_rows
from pagegraph.compiler.passes.graph.fuse_rope import fuse_rope, rotate_one_row
from pagegraph.compiler.passes.graph.fuse_routers import fuse_routers
from pagegraph.compiler.passes.graph.fuse_states import fuse_states
from pagegraph.compiler.passes.modules.fixed_linears import fixed_linears
from pagegraph.compiler.passes.modules.merge_linears import merge_linears
from pagegraph.compiler.passes.modules.plain_columns import plain_columns
from pagegraph.compiler.passes.modules.quant_experts import quant_experts
from pagegraph.compiler.passes.modules.quant_linears import quant_linears
from pagegraph.compiler.passes.modules.rotary_once import rotary_once
from pagegraph.compiler.passes.modules.skinny_linears import skinny_linears
from pagegraph.compiler.passes.modules.wide_norms import wide_norms


@dataclass(frozen=True, slots=True)
class Pass:
    """A rewrite of the model in place; `run` returns the number of places changed, `setting` switches it (none: always on).

    `options` are settings that `run` takes by name. by_device: it takes `device_type` too, where weights will be if they
    have no values yet.
    """

    setting: str | None
    run: Callable[..., int]
    options: tuple[str, ...] = ()
    by_device: bool = False


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did: places changed and seconds taken."""

    name: str
    changes: int
    seconds: float


# Rows are put in order ahead of the merge, which hands out columns by their places. Quantised linears get their device's form after the merge, which needs them as they were loaded. `fixed_linears` comes ahead of
# `skinny_linears`, which finds no linear then.
PASSES: tuple[Pass, ...] = (
    Pass(None, plain_columns),
    Pass("merge_linears", merge_linears),
    Pass(None, quant_linears, ("round_activations",), by_device=True),
    Pass(None, quant_experts, ("round_activations",), by_device=True),
    Pass("deterministic", fixed_linears),
    Pass("skinny_linears", skinny_linears, by_device=True),
    Pass("rotary_once", rotary_once),
    Pass("fuse_rows", wide_norms, by_device=True),
)


# In this order: what fuse_rope looks for holds norms, and fuse_linears looks for what fuse_rows and fuse_routers leave.
GRAPH_PASSES = {
    "fuse_rope": fuse_rope,
    "fuse_rows": fuse_rows,
    "fuse_routers": fuse_routers,
    "fuse_linears": fuse_linears,
    "fuse_states": fuse_states,
}


def graph_passes(options: PassOptions, device: torch.device) -> list[Callable[[torch.fx.GraphModule], int]]:
    """The passes over the traced graph. On the CPU the compiler's own loops are the better form, of one row's products too.

    `deterministic` leaves out what exists for few rows alone.
    """
    if device.type != "cuda":
        return [] if options.deterministic else [rotate_one_row, one_row_linears, fuse_int4_layer]
    return [graph_pass for setting, graph_pass in GRAPH_PASSES.items() if getattr(options, setting)]


def apply_module_passes(
    model: nn.Module,
    options: PassOptions,
    device_type: str | None = None,
    done: Callable[[PassReport], None] = lambda report: None,
) -> list[PassReport]:
    """Run the passes that `options` switch on; each pass checks its own result. One that a setting is named for is told of
    where it changes nothing, too.

    device_type: of a model without values, on the meta device, where it would be. done: told of each pass behind it.
    """
    reports = []
    for step in PASSES:
        if step.setting is None or getattr(options, step.setting):
            start = time.perf_counter()
            given = {name: getattr(options, name) for name in step.options}
            changes = step.run(model, **given, **({"device_type": device_type} if step.by_device else {}))
            if changes or step.setting == step.run.__name__:
                reports.append(PassReport(step.run.__name__, changes, time.perf_counter() - start))
                done(reports[-1])
    return reports
