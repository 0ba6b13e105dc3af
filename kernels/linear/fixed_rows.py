"""Products on a CPU that give a row the same bits whatever rows are beside it and however many they are.

PyTorch's products choose among kernels by the number of rows, and some add up in another order. Which do differs between
CPUs, so it is found out: the first product of a shape looks for a number of rows whose order other numbers keep, and each
other number is compared with it once, row by row, before it is used. Where one differs, its rows go in blocks of the number
that was found. The order of a sum does not depend on the numbers in it, so what holds of random rows holds of all.
Knows no weights: a product is a function of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.linear.reference import silu_mul

Product = Callable[[Tensor], Tensor]  # rows [M, K] -> [M, N]

CANDIDATES = (4, 16, 64, 256)  # rows whose order of sums may be the one that others keep
STEPS = ((32, 4), (128, 16), (512, 64))  # up to so many rows they are padded to a multiple of this
LAST_STEP = 256


class _Order(NamedTuple):
    """What was found of products of one shape."""

    rows: int  # of the block that all others are compared with
    agrees: dict[int, bool]  # numbers of rows that were compared


_orders: dict[Hashable, _Order] = {}


def padded(rows: int) -> int:
    """The number of rows that a product of so many is made with, unless they go in blocks."""
    step = next((step for most, step in STEPS if rows <= most), LAST_STEP)
    return -(-rows // step) * step


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
    """`pagegraph::fixed_linear` on a CPU."""
    key = (weight.shape, weight.dtype, bias is None)
    rows = x.reshape(-1, x.shape[-1])
    product = product_of(rows, lambda some: functional.linear(some, weight, bias), key).view(*x.shape[:-1], -1)
    return silu_mul(product) if gated else product


def product_of(rows: Tensor, product: Product, key: Hashable) -> Tensor:
    """product(rows [T, K]) -> [T, N], each row as in any other call with this `key`, which tells products of other shapes apart.

    RuntimeError where no number of rows gives all of its rows the same order of sums.
    """
    order = _order(rows, product, (key, torch.get_num_threads()))
    count = max(padded(len(rows)), order.rows)
    if count not in order.agrees:
        order.agrees[count] = _agrees(rows, product, order.rows, count)
    if not order.agrees[count]:
        count = -(-len(rows) // order.rows) * order.rows
    given = rows if len(rows) == count else functional.pad(rows, (0, 0, 0, count - len(rows)))
    out = product(given) if order.agrees.get(count) else torch.cat([product(one) for one in given.split(order.rows)])
    return out[: len(rows)]


def _order(like: Tensor, product: Product, key: Hashable) -> _Order:
    if key not in _orders:
        # What prompts are multiplied with, in the fewest rows: of a step of decodes there are few.
        found = (
            one
            for largest in reversed(CANDIDATES)
            for one in CANDIDATES
            if one <= largest and all(_agrees(like, product, one, other) for other in {one, largest})
        )
        rows = next(found, None)
        if rows is None:
            raise RuntimeError(
                f"deterministic=true: on this CPU a row's product of {like.shape[1]} columns in {like.dtype} depends on its"
                " place among others; set deterministic=false, or another dtype"
            )
        _orders[key] = _Order(rows, {rows: True})
    return _orders[key]


def _agrees(like: Tensor, product: Product, one: int, other: int) -> bool:
    """Whether rows come out of a product of `other` rows, at any place, as out of one of `one` rows at the first."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(min(CANDIDATES), like.shape[1], generator=generator).to(like.dtype)
    expected = torch.cat([product(_repeated(row, one))[:1] for row in few[:, None]])
    for shift in range(len(few)):  # so that each row stands at each place
        out = product(_repeated(few.roll(shift, 0), other))
        if not torch.equal(out, _repeated(expected.roll(shift, 0), other)):
            return False
    return True


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows.repeat(-(-count // len(rows)), 1)[:count].contiguous()
