"""Graph pass: what recurrent layers copy or compute ahead of their ops is read where it lies.

Columns that lie side by side in one product and are put together for a convolution are those columns (`compiler.passes.modules.
plain_columns` brings them there). Queries and keys repeated for each head of values that shares them go to the delta rule as they
are, whose op knows of heads that share and makes its gates of what was projected. A scan takes the logarithm of its rates, which is
the parameter. Knows FX graphs; knows no models.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.passes.graph.patterns import before, call, is_call, is_method, is_view, rewrite, shape

ops = torch.ops.pagegraph
SPLITS = (torch.split, torch.functional.split)
RATES, BY_LOGARITHM = 2, 10  # among the arguments of a scan
DECAY, NORMALIZE = 3, 9  # among those of a delta rule, which end there where a step has no draft tokens


def fuse_states(module: GraphModule) -> int:
    """Rewrite every convolution, delta rule and scan of `module` that reads such copies or results; returns how many."""
    graph = module.graph
    return rewrite(module, lambda node: any([fuse(graph, node) for fuse in FUSES]))


def _take_logarithm(graph: Graph, scan: Node) -> bool:
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


def _take_gates(graph: Graph, rule: Node) -> bool:
    """Decays -exp(A_log) * softplus(a + dt_bias) in float32 and betas sigmoid(b) of a, b [1, T, H] and parameters [H]."""
    if not is_call(rule, ops.gated_delta) or not all(
        is_call(one, operator.getitem, 1, 0) for one in rule.args[DECAY:][:2]
    ):
        return False
    decay, beta = (one.args[0] for one in rule.args[DECAY:][:2])
    if not is_method(beta, "sigmoid") or not is_call(decay, operator.mul) or beta.kwargs:
        return False
    rate, soft = decay.args
    if not is_call(rate, operator.neg) or not is_method(rate.args[0], "exp") or not is_call(soft, functional.softplus):
        return False
    added = soft.args[0]
    if len(soft.args) > 1 or soft.kwargs or not is_call(added, operator.add):
        return False
    wide, bias = added.args
    log = rate.args[0].args[0]
    if not all(is_method(one, "float") for one in (wide, log)):
        return False
    a, log, b = wide.args[0], log.args[0], beta.args[0]
    heads = shape(rule.args[DECAY - 1])[1:2]
    if any(not isinstance(one, Node) or one.op != "placeholder" or shape(one) != heads for one in (bias, log)):
        return False
    if len(shape(a)) != 3 or len(shape(b)) != 3:
        return False
    with graph.inserting_before(rule):
        a, b = (call(graph, operator.getitem, one, 0) for one in (a, b))
    drafts = rule.args[NORMALIZE + 1 :] or (None, None)
    rule.args = (*rule.args[:DECAY], a, b, *rule.args[DECAY + 2 : NORMALIZE + 1], *drafts, log, bias)
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
    splits, places = cast(tuple[tuple[Node, ...], tuple[int, ...]], tuple(zip(*parts)))
    if len(set(splits)) > 1 or list(places) != list(range(places[0], places[0] + len(places))):
        return False
    source, sizes = splits[0].args[0], cast(list[int], splits[0].args[1])
    with graph.inserting_before(convolution):
        rows = call(graph, operator.getitem, source, 0)
        columns = call(graph, "narrow", rows, 1, sum(sizes[: places[0]]), sum(sizes[places[0] : places[-1] + 1]))
    convolution.args = (columns, *convolution.args[1:])
    return True


def _part(part: Node) -> tuple[Node, int] | None:
    """(split of the last of three dimensions, which of its parts this is, whole and in its order)."""
    base = before(part, lambda node: not is_view(node))
    if base is None or str(shape(base)) != str(shape(part)) or not is_call(base, operator.getitem):
        return None
    split, at = base.args
    named = isinstance(split, Node) and (any(is_call(split, one) for one in SPLITS) or split.target == "split")
    if not named or not isinstance(split.args[1], list | tuple) or len(split.args) != 2:
        return None
    whole = len(shape(base)) == 3 and sum(cast(list[int], split.args[1])) == shape(split.args[0])[-1]
    return (split, at) if whole and split.kwargs in ({"dim": -1}, {"dim": 2}) else None  # type: ignore[return-value]


FUSES = _read_columns, _share_keys, _take_gates, _take_logarithm
