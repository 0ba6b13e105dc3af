"""Experts of a mixture on a CPU: rows sorted by expert, then one product an expert, straight into its rows of the result.

Of several tokens PyTorch's grouped product does that where it can: it loops without Python. What stands between the products
runs once over all rows; a token's choices are added up without rounding between. Quantised weights of the chosen are dequantised
some rows at a time, while they are in a cache; of few tokens C++ multiplies them as they are (`cpu_few`). Knows no model.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.moe import cpu_few
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.reference import between
from pagegraph.kernels.quant.cpu import dequantized_rows
from pagegraph.kernels.quant.weight import QuantWeight

Parts = list[tuple[int, int, int]]  # an expert, its first row and the one behind its last
DEQUANTIZED_AT_ONCE = 1 << 17  # values: in float32 half a megabyte


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
    residual: Tensor | None = None,
) -> Tensor:
    """See `kernels.ops`."""
    how = Form(*form)  # type: ignore[arg-type]
    out = _experts(x, chosen, weights, up, up_bias, down, down_bias, query_start, how, len(up))
    return out if residual is None else out + residual


def quant_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    up_group: int,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    down_group: int,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    *form: str | float | bool,
) -> Tensor:
    """See `kernels.ops`."""
    how = Form(*form)  # type: ignore[arg-type]
    first = QuantWeight(up, up_scale, up_zero, None, up_group, up.shape[1])
    second = QuantWeight(down, down_scale, down_zero, None, down_group, down.shape[1])
    return _experts(x, chosen, weights, first, up_bias, second, down_bias, query_start, how, len(up))


def _experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor | QuantWeight,
    up_bias: Tensor | None,
    down: Tensor | QuantWeight,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    how: Form,
    experts: int,
) -> Tensor:
    tokens = len(x)
    live = tokens if query_start is None else int(query_start[-1])
    out = torch.empty_like(x)
    out[live:] = 0
    if not live:
        return out
    choices = chosen.shape[1]
    parts: Parts | Tensor
    if live == 1:
        order, parts = None, [(expert, at, at + 1) for at, expert in enumerate(chosen[0].tolist())]
        rows = x[:1].expand(choices, -1)
    else:
        ids, order = chosen[:live].reshape(-1).sort()
        rows = x[order // choices]
        plain = [one for one in (up, down) if isinstance(one, Tensor)]
        if len(plain) == 2 and up_bias is None and _aligned(x, *plain) and ids[0] >= 0 and ids[-1] < experts:
            parts = torch.searchsorted(ids, torch.arange(1, experts + 1, dtype=ids.dtype), out_int32=True)
        else:
            parts = _parts(ids.tolist())
    if not isinstance(parts, Tensor):
        parts = [part for part in parts if 0 <= part[0] < experts]
    inner = between(_products(rows, parts, up, up_bias, how.transposed), how)
    products = _products(inner, parts, down, down_bias, how.transposed)
    if order is not None:  # back in the order of tokens
        products = torch.empty_like(products).index_copy_(0, order, products)
    wide = torch.promote_types(x.dtype, weights.dtype)
    weighted = torch.bmm(weights[:live, None].to(wide), products.view(live, choices, -1).to(wide))
    out[:live] = weighted[:, 0]
    return out


def _aligned(*tensors: Tensor) -> bool:
    """Whether PyTorch's grouped product takes them: rows, and the other axis of weights, of whole 16 bytes."""
    sizes = [size * one.element_size() for one in tensors for size in one.shape[-2 if one.dim() > 2 else -1 :]]
    return all(size % 16 == 0 for size in (*sizes, *(one.data_ptr() for one in tensors)))


def _parts(ids: list[int]) -> Parts:
    """Of sorted ids: (id, first, behind the last) of each run."""
    parts, first = [], 0
    for expert, run in groupby(ids):
        last = first + sum(1 for _ in run)
        parts.append((expert, first, last))
        first = last
    return parts


def _products(
    rows: Tensor, parts: Parts | Tensor, weight: Tensor | QuantWeight, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Of rows [N, in], where those from `first` on are `expert`'s -> [N, out]; rows of no expert are 0.

    A tensor of parts says where each expert's rows end: all rows are some expert's, and there is no bias and no quantised weight.
    """
    if isinstance(parts, Tensor):
        assert isinstance(weight, Tensor)
        return functional.grouped_mm(rows, weight if transposed else weight.transpose(1, 2), offs=parts)
    if isinstance(weight, QuantWeight):
        return _quant_products(rows, parts, weight, bias)
    by_column = weight if transposed else weight.transpose(1, 2)
    out = _empty(rows, by_column.shape[2], parts)
    for expert, first, last in parts:
        if bias is None:
            torch.mm(rows[first:last], by_column[expert], out=out[first:last])
        else:
            torch.addmm(bias[expert], rows[first:last], by_column[expert], out=out[first:last])
    return out


def _quant_products(rows: Tensor, parts: Parts, weight: QuantWeight, bias: Tensor | None) -> Tensor:
    """`_products` by a weight [E, out, in], of which some rows at a time are dequantised."""
    out = _empty(rows, weight.out_size, parts)
    if cpu_few.takes(len(rows), len(parts), weight):
        cpu_few.products(rows, parts, weight, out)
        if bias is not None:
            for expert, first, last in parts:
                out[first:last] += bias[expert]
        return out
    step = max(DEQUANTIZED_AT_ONCE // weight.in_size, 1)
    for expert, first, last in parts:
        for begin in range(0, weight.out_size, step):
            at = slice(begin, min(begin + step, weight.out_size))
            some = dequantized_rows(weight, expert, at, rows.dtype)
            out[first:last, at] = functional.linear(rows[first:last], some, None if bias is None else bias[expert, at])
    return out


def _empty(rows: Tensor, columns: int, parts: Parts) -> Tensor:
    """For the products of so many rows; those that are in no part are 0."""
    whole = sum(last - first for _, first, last in parts) == len(rows)
    return rows.new_empty(len(rows), columns) if whole else rows.new_zeros(len(rows), columns)
