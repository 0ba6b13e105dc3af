"""What an op costs at least: a table of operations and bytes by op, beside the table of ops.

Operations are multiplications and additions; bytes are those of weights, of keys and values, each read once, and of
recurrent states, each read and written once. What
passes between ops is not counted: it may stay in a cache, or in registers where ops share a kernel. Rows of `COSTS` give
operations; which arguments are weights the caller knows. Knows no device, no model and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph

Kind = Literal["linears", "experts", "attention", "states"]


class StepRows(NamedTuple):
    """Of the S sequences of a step: tokens in it, and tokens in all with those; int64 [S]."""

    rows: np.ndarray
    seq_lens: np.ndarray


class Cost(NamedTuple):
    """Of one call. `narrow`: its weights have 8 bits or fewer, so that it may be multiplied as 8-bit numbers."""

    kind: Kind
    flops: int
    weight_bytes: int
    cache_bytes: int = 0
    narrow: bool = False


def cost_of(
    op: Any, arguments: Mapping[str, Any], out: Any, weights: list[Tensor], step: StepRows, spread: int = 1
) -> Cost | None:
    """Of a call of `op` with arguments by name, `weights` being those of them that are; None where it is not counted.

    spread: over how many ranks whole experts are, each of which computes as many of what tokens chose.

    A product of two activations is not: models that are served have such products in attention alone.
    """
    if op in ATTENTION:
        return _attention(arguments, step)
    if op in STATES:
        return _state(arguments, STATES[op](arguments), _bytes(weights), step)
    if op not in PRODUCTS or not weights:
        return None
    flops = PRODUCTS[op](arguments, out)
    narrow = any(one.element_size() == 1 for one in weights)
    if max(one.dim() for one in weights) >= 3 and op in EXPERTS:
        tokens = int(step.rows.sum())
        share = EXPERTS[op](arguments, tokens, spread)
        return Cost("experts", flops // spread, math.ceil(share * _bytes(weights)), narrow=narrow)
    return Cost("linears", flops, _bytes(weights), narrow=narrow)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _attention(arguments: Mapping[str, Any], step: StepRows) -> Cost:
    """Each row with the keys it sees; each key and value that some row of its sequence sees is touched once."""
    query, value = arguments["query"], arguments["value"]
    heads, size, value_size = query.shape[1], query.shape[2], value.shape[2]
    pairs, touched = visible(step, arguments["window"], arguments["chunk"])
    of_token = value.shape[1] * (size + value_size) * arguments["key_cache"].element_size()
    return Cost("attention", 2 * heads * (size + value_size) * pairs, 0, of_token * touched)


def _state(arguments: Mapping[str, Any], flops: int, weight_bytes: int, step: StepRows) -> Cost:
    """Of `flops` a token; the state of each sequence with rows is read and written."""
    slot = arguments["states"][0]
    touched = 2 * slot.numel() * slot.element_size() * int(np.count_nonzero(step.rows))
    return Cost("states", flops * int(step.rows.sum()), weight_bytes, touched)


def visible(step: StepRows, window: int, chunk: int) -> tuple[int, int]:
    """Pairs of a row and a key that it sees, and keys that some row sees; over all sequences of the step."""
    pairs = touched = 0
    kinds, counts = np.unique(np.stack([step.rows, step.seq_lens]), axis=1, return_counts=True)
    for (rows, length), count in zip(kinds.T.tolist(), counts.tolist()):
        positions = np.arange(length - rows, length)
        first = np.zeros(rows, np.int64)
        if window:
            first = np.maximum(positions - window + 1, 0)
        elif chunk:
            first = positions - positions % chunk
        pairs += count * int((positions - first + 1).sum())
        touched += count * (length - int(first[0]) if rows else 0)
    return pairs, touched


def _of_matrices(left: str, right: str) -> Callable[[Mapping[str, Any], Any], int]:
    """[.., M, K] @ [.., K, N]."""

    def flops(arguments: Mapping[str, Any], out: Any) -> int:
        return 2 * out.numel() * arguments[left].shape[-1]

    return flops


def _of_rows(outputs: Callable[[Mapping[str, Any]], int]) -> Callable[[Mapping[str, Any], Any], int]:
    """x [.., K] by a weight of so many outputs."""

    def flops(arguments: Mapping[str, Any], out: Any) -> int:
        return 2 * arguments["x"].numel() * outputs(arguments)

    return flops


def _two_linears(arguments: Mapping[str, Any], out: Any) -> int:
    x, first, second = arguments["x"], arguments["first"], arguments["second"]
    return 2 * math.prod(x.shape[:-1]) * (first.numel() + second.numel())


def _two_repacked(arguments: Mapping[str, Any], out: Any) -> int:
    x, between = arguments["x"], arguments["out_size"]
    if arguments["second_qweight"] is None:
        return 2 * x.numel() * between
    return 2 * x.numel() * between + 2 * math.prod(x.shape[:-1]) * between // 2 * arguments["second_size"]


def _int4_layer(arguments: Mapping[str, Any], out: Any) -> int:
    """Its packed weights, one row each: two 4-bit values a byte."""
    return sum(2 * 2 * one.numel() for one in arguments["tensors"] if one.dtype == torch.uint8)


def _experts(arguments: Mapping[str, Any], out: Any) -> int:
    up, down = arguments["up"], arguments["down"]
    return 2 * arguments["chosen"].numel() * (up.numel() + down.numel()) // up.shape[0]


def _quant_experts(arguments: Mapping[str, Any], out: Any) -> int:
    up, down, hidden = arguments["up"], arguments["down"], arguments["x"].shape[1]
    inner = up.shape[1] // 2 if arguments["gated"] else up.shape[1]
    return 2 * arguments["chosen"].numel() * (up.shape[1] * hidden + down.shape[1] * inner)


def _repacked_experts(arguments: Mapping[str, Any], out: Any) -> int:
    inner, hidden = arguments["inner"], arguments["x"].shape[1]
    return 2 * arguments["chosen"].numel() * (3 if arguments["gated"] else 2) * inner * hidden


def _chosen_of_rows(arguments: Mapping[str, Any], tokens: int, spread: int) -> float:
    """As `_chosen`; rows are tokens that name what they chose."""
    return _share(arguments["chosen"].numel() / spread, arguments["up"].shape[0], tokens)


def _share(pairs: float, experts: int, tokens: int) -> float:
    """Of experts that some token chose, where each chooses at random."""
    each = min(pairs / max(tokens, 1) / experts, 1.0)
    return 1 - (1 - each) ** tokens


def _chosen(arguments: Mapping[str, Any], tokens: int, spread: int) -> float:
    """The share of experts that some token chose, where each chooses at random: rows are chosen experts of tokens."""
    experts = next(one.shape[0] for one in arguments.values() if isinstance(one, Tensor) and one.dim() == 3)
    rows = next(one.shape[0] for one in arguments.values() if isinstance(one, Tensor) and one.dim() == 2)
    return _share(rows / spread, experts, tokens)


aten, ours = torch.ops.aten, torch.ops.pagegraph
ATTENTION = {ours.paged_attention.default, ours.rope_attention.default}
# op: operations of a token by arguments: of each element of a state it decays, takes up what is added, and is read
STATES: dict[Any, Callable[[Mapping[str, Any]], int]] = {
    ours.causal_conv.default: lambda given: 2 * given["weight"].numel(),
    ours.gated_delta.default: lambda given: 7 * given["states"][0].numel(),
    ours.selective_scan.default: lambda given: 5 * given["states"][0].numel(),
}
# op: operations by arguments and result
PRODUCTS: dict[Any, Callable[[Mapping[str, Any], Any], int]] = {
    aten.mm.default: _of_matrices("self", "mat2"),
    aten.addmm.default: _of_matrices("mat1", "mat2"),
    aten.bmm.default: _of_matrices("self", "mat2"),
    aten.baddbmm.default: _of_matrices("batch1", "batch2"),
    aten._int_mm.default: _of_matrices("self", "mat2"),
    aten._grouped_mm.default: _of_matrices("self", "mat2"),
    ours.experts.default: _experts,
    ours.quant_experts.default: _quant_experts,
    ours.repacked_experts.default: _repacked_experts,
    ours.linear.default: _of_rows(lambda given: given["weight"].shape[0]),
    ours.fixed_linear.default: _of_rows(lambda given: given["weight"].shape[0]),
    ours.linear_norm_linear.default: _two_linears,
    ours.norm_linear.default: _of_rows(lambda arguments: arguments["weight"].shape[0]),
    ours.quant_linear.default: _of_rows(lambda given: given["qweight"].shape[0]),
    ours.repacked_linear.default: _of_rows(lambda given: given["out_size"]),
    ours.norm_repacked_linear.default: _two_repacked,
    ours.int4_packed_linear.default: _of_rows(lambda given: given["packed"].shape[0]),
    ours.fixed_int4_linear.default: _of_rows(lambda given: given["packed"].shape[0]),
    ours.int4_packed_layer.default: _int4_layer,
}
# op over stacked experts: the share of them that is read, by arguments, tokens of the step and ranks that whole experts are spread over
EXPERTS: dict[Any, Callable[[Mapping[str, Any], int, int], float]] = {
    aten._grouped_mm.default: _chosen,
    ours.experts.default: _chosen_of_rows,
    ours.quant_experts.default: _chosen_of_rows,
    ours.repacked_experts.default: _chosen_of_rows,
    aten.bmm.default: lambda arguments, tokens, spread: 1.0,
    aten.baddbmm.default: lambda arguments, tokens, spread: 1.0,
}
