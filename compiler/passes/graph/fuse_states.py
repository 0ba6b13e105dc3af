"""Graph pass: what recurrent layers copy or compute ahead of their ops is read where it lies.

Columns that lie side by side in one product and are put together for a convolution are those columns (`compiler.passes.modules.
plain_columns` brings them there). Queries and keys repeated for each head of values that shares them go to the delta rule as they
are, whose op knows of heads that share. A scan takes the logarithm of its rates, which is the parameter. Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.passes.graph.patterns import call, is_call, is_method, is_view, rewrite, shape

ops = torch.ops.pagegraph
SPLITS = (torch.split, torch.functional.split)
RATES, BY_LOGARITHM = 2, 10  # among the arguments of a scan


def fuse_states(module: GraphModule) -> int:
    """Rewrite every convolution, delta rule and scan of `module` that reads such copies; returns how many."""
    graph = module.graph
    return rewrite(module, lambda node: _read_columns(graph, node) or _share_keys(graph, node) or _take_logarithm(node))


def _take_logarithm(scan: Node) -> bool:
    """Rates = -exp(a parameter, in float32)."""
    if not is_call(scan, ops.selective_scan) or scan.args[BY_LOGARITHM]:
        return False
    rates = scan.args[RATES]
    if not is_call(rates, operator.neg) or not is_call(rates.args[0], torch.exp):
        return False
    log = rates.args[0].args[0]
    if is_method(log, "float"):
        log = log.args[0]
    if log.op != "placeholder" or shape(log) != shape(rates):
        return False
    scan.args = (*scan.args[:RATES], log, *scan.args[RATES + 1 : BY_LOGARITHM], True, *scan.args[BY_LOGARITHM + 1 :])
    return True


def _share_keys(graph: Graph, rule: Node) -> bool:
    if not is_call(rule, ops.gated_delta):
        return False
    found = [_repeated(one) for one in rule.args[:2]]
    if not all(found) or len({times for _, times in found}) > 1:
        return False
    with graph.inserting_before(rule):
        query, key = (call(graph, operator.getitem, heads, 0) for heads, _ in found)
    rule.args = (query, key, *rule.args[2:])
    return True


def _repeated(rows: Node) -> tuple[Node, int] | None:
    """(heads [1, T, G, D], how often each stands in rows [T, H, D])."""
    if not is_call(rows, operator.getitem, 1, 0):
        return None
    repeat = rows.args[0]
    if not (isinstance(repeat, Node) and repeat.op == "call_method" and repeat.target == "repeat_interleave"):
        return None
    if len(repeat.args) != 2 or not isinstance(repeat.args[1], int) or repeat.kwargs != {"dim": 2}:
        return None
    return (repeat.args[0], repeat.args[1]) if len(shape(repeat)) == 4 else None  # type: ignore[return-value]


def _read_columns(graph: Graph, convolution: Node) -> bool:
    """x = cat(parts, -1).transpose(1, 2)[0].T of parts [1, T, n] side by side in one split."""
    if not is_call(convolution, ops.causal_conv) or not is_call(across := convolution.args[0], getattr, 1, "T"):
        return False
    if not is_call(first := across.args[0], operator.getitem, 1, 0) or not is_method(first.args[0], "transpose", 1, 2):
        return False
    joined = first.args[0].args[0]
    if not is_call(joined, torch.cat) or joined.kwargs not in ({"dim": -1}, {"dim": 2}) or len(joined.args) != 1:
        return False
    parts = [_part(one) for one in joined.args[0]]
    if not parts or None in parts:
        return False
    splits, places = zip(*parts)
    if len(set(splits)) > 1 or list(places) != list(range(places[0], places[0] + len(places))):
        return False
    source, sizes = splits[0].args[:2]
    with graph.inserting_before(convolution):
        rows = call(graph, operator.getitem, source, 0)
        begin, end = (sum(sizes[:at]) for at in (places[0], places[-1] + 1))
        columns = call(graph, "narrow", rows, 1, begin, end - begin)
    convolution.args = (columns, *convolution.args[1:])
    return True


def _part(part: Node) -> tuple[Node, int] | None:
    """(split of the last of three dimensions, which of its parts this is, whole and in its order)."""
    base = part
    while is_view(base):
        base = base.args[0]  # type: ignore[assignment]
    if str(shape(base)) != str(shape(part)) or not is_call(base, operator.getitem):
        return None
    split, at = base.args
    named = isinstance(split, Node) and (any(is_call(split, one) for one in SPLITS) or split.target == "split")
    if not named or not isinstance(split.args[1], list | tuple) or len(split.args) != 2:
        return None
    whole = len(shape(base)) == 3 and sum(split.args[1]) == shape(split.args[0])[-1]
    return (split, at) if whole and split.kwargs in ({"dim": -1}, {"dim": 2}) else None  # type: ignore[return-value]
