"""Experts of a mixture on a CPU: rows sorted by expert, then one product an expert, straight into its rows of the result.

What stands between the products runs once over all rows; a token's choices are added up without rounding between. Knows no model.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.reference import between


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    *form: str | float | bool,
) -> Tensor:
    """See `kernels.ops`."""
    how = Form(*form)  # type: ignore[arg-type]
    tokens = len(x)
    live = tokens if query_start is None else int(query_start[-1])
    out = torch.empty_like(x)
    out[live:] = 0
    if not live:
        return out
    choices = chosen.shape[1]
    if live == 1:
        order, parts = None, [(expert, at, at + 1) for at, expert in enumerate(chosen[0].tolist())]
        rows = x[:1].expand(choices, -1)
    else:
        ids, order = chosen[:live].reshape(-1).sort()
        parts = _parts(ids.tolist())
        rows = x[order // choices]
    parts = [part for part in parts if 0 <= part[0] < len(up)]
    inner = between(_products(rows, parts, up, up_bias, how.transposed), how)
    products = _products(inner, parts, down, down_bias, how.transposed)
    if order is not None:  # back in the order of tokens
        products = torch.empty_like(products).index_copy_(0, order, products)
    wide = torch.promote_types(x.dtype, weights.dtype)
    weighted = torch.bmm(weights[:live, None].to(wide), products.view(live, choices, -1).to(wide))
    out[:live] = weighted[:, 0]
    return out


def _parts(ids: list[int]) -> list[tuple[int, int, int]]:
    """Of sorted ids: (id, first, behind the last) of each run."""
    parts, first = [], 0
    for expert, run in groupby(ids):
        last = first + sum(1 for _ in run)
        parts.append((expert, first, last))
        first = last
    return parts


def _products(
    rows: Tensor, parts: list[tuple[int, int, int]], weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Of rows [N, in], where those from `first` on are `expert`'s -> [N, out]; rows of no expert are 0."""
    by_column = weight if transposed else weight.transpose(1, 2)
    out = rows.new_empty(len(rows), by_column.shape[2])
    if sum(last - first for _, first, last in parts) < len(rows):
        out.zero_()
    for expert, first, last in parts:
        if bias is None:
            torch.mm(rows[first:last], by_column[expert], out=out[first:last])
        else:
            torch.addmm(bias[expert], rows[first:last], by_column[expert], out=out[first:last])
    return out
