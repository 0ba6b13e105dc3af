"""What the passes over the traced graph changed, and what they left and why, as far as the graph tells.

Runs the passes themselves on the graph, on the meta device, and looks at what is left of what each looks for. Knows FX graphs; knows
no device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule
from torch.nn import functional

from pagegraph.compiler.passes.graph import fuse_rope
from pagegraph.compiler.passes.graph.patterns import is_call, shape

ours = torch.ops.pagegraph
LINEARS = (torch._C._nn.linear, functional.linear, ours.linear)


@dataclass(frozen=True, slots=True)
class PassResult:
    """A pass: places it changed, places of the kind it looks for that it left, and reason -> how many of them."""

    name: str
    what: str
    hits: int
    missed: dict[str, int] = field(default_factory=dict)


def run_passes(module: GraphModule, passes: list[Callable[[GraphModule], int]]) -> list[PassResult]:
    """Run these passes over `module`, which they change."""
    found = []
    for one in passes:
        name = one.__name__
        what, reasons = KNOWN.get(name, ("places", lambda module: Counter()))
        hits = one(module)
        found.append(PassResult(name, what, hits, dict(reasons(module))))
    return found


def _unrotated(module: GraphModule) -> Counter[str]:
    """Attentions that a rotation could have joined."""
    why: Counter[str] = Counter()
    for node in module.graph.nodes:
        if is_call(node, ours.paged_attention):
            query, key = (fuse_rope.rotated(one) for one in node.args[:2])
            if query is None or key is None:
                which = " and ".join(name for name, one in (("queries", query), ("keys", key)) if one is None)
                why[
                    f"{which} are not rotated in the half-split form: none, partial, interleaved, or normed after it"
                ] += 1
            else:
                why["queries and keys are rotated by other angles, or in another dtype than they have"] += 1
    return why


def _unfused_rows(module: GraphModule) -> Counter[str]:
    """Norms and gates that stayed small nodes."""
    why: Counter[str] = Counter()
    for node in module.graph.nodes:
        if is_call(node, functional.layer_norm):
            why["layer norms, with a mean: the kernel is of RMS norms"] += 1
        elif is_call(node, torch.rsqrt):
            heads = len(shape(node)) > 3
            if heads:
                why["norms over a head, which rotation joins where it can"] += 1
            else:
                why["RMS norms of another form, such as a weight with one added or in another dtype"] += 1
        elif node.op == "call_function" and node.target in (functional.silu, functional.gelu):
            gelu = node.target is functional.gelu
            why["GELU: the kernel is of gated SiLU" if gelu else "SiLU that gates no half of a merged product"] += 1
    return why


def _single_linears(module: GraphModule) -> Counter[str]:
    """Products that stand alone."""
    why: Counter[str] = Counter()
    for node in module.graph.nodes:
        if is_call(node, ours.linear) or is_call(node, ours.repacked_linear):
            why["not between two norms with residual additions, as the first product, the last and the head"] += 1
    return why


def _other_routers(module: GraphModule) -> Counter[str]:
    """Choices of experts that stayed PyTorch's kernels."""
    left = sum(is_call(node, torch.topk) or node.target == "topk" for node in module.graph.nodes)
    return Counter({"shares by sigmoid, or experts chosen among groups": left} if left else {})


def _many_rows(module: GraphModule) -> Counter[str]:
    """Products that stayed the library's: all of them where a step has more rows."""
    left = sum(1 for node in module.graph.nodes if any(is_call(node, one) for one in LINEARS))
    return Counter(
        {"more than one row, or a dtype of 32 bits: the library's product is the better one": left} if left else {}
    )


KNOWN: dict[str, tuple[str, Callable[[GraphModule], Counter[str]]]] = {
    "fuse_rope": ("attentions with rotation and head norms in them", _unrotated),
    "rotate_one_row": ("attentions with rotation in them", _unrotated),
    "fuse_rows": ("norms, residual additions and gates as kernels of ours", _unfused_rows),
    "fuse_linears": ("products joined with what stands around them", _single_linears),
    "fuse_routers": ("choices of experts in one kernel", _other_routers),
    "fuse_states": ("convolutions, delta rules and scans that read what lies there", lambda module: Counter()),
    "one_row_linears": ("products of one row as loops of the compiler", _many_rows),
    "fuse_int4_layer": ("pairs of 4-bit products in one call", lambda module: Counter()),
}
