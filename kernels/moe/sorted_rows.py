"""Triton: rows of the tokens of each pair, one behind the other in the order of experts, and the list of tiles without empty slots.

For products whose rows the bulk copy engine (TMA) copies: it takes rows that are neighbours. A program of grouped products takes
the next tile until none is left, so the list has no holes, and a count says where it ends. Knows no weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.moe.route import Routes
from pagegraph.kernels.pdl import dependent, wait

ROWS, COLUMNS = 8, 512  # of a program
SLOTS = 1024  # that are looked at at once


class SortedRows(NamedTuple):
    """rows [T * k, H], and scales [T * k] where x has some: as `Routes.order` has them; those behind the last pair are not written.

    tiles int32 [slots, 3]: as those of `Routes`, in their order, the empty ones left out. counts int32 [3]: tiles, then how many
    work items of the first and of the second product are taken, which is 0.
    """

    rows: Tensor
    tiles: Tensor
    counts: Tensor
    scales: Tensor | None


@triton.jit(do_not_specialize=["num_slots"])
def sorted_rows_kernel(
    rows_ptr,
    scales_ptr,
    dense_ptr,
    counts_ptr,
    x_ptr,
    scale_ptr,
    order_ptr,
    tiles_ptr,
    num_slots,
    CHOICES: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    part = tl.program_id(0)
    if PDL:
        wait()
    if part == 0:
        if tl.program_id(1) == 0:
            count = 0
            for at in range(0, num_slots, SLOTS):
                slot = at + tl.arange(0, SLOTS)
                inside = slot < num_slots
                first = tl.load(tiles_ptr + 3 * slot + 1, mask=inside, other=0)
                last = tl.load(tiles_ptr + 3 * slot + 2, mask=inside, other=0)
                full = first < last
                expert = tl.load(tiles_ptr + 3 * slot, mask=full, other=0)
                ones = full.to(tl.int32)
                place_at = dense_ptr + 3 * (count + tl.cumsum(ones, 0) - ones)
                tl.store(place_at, expert, mask=full)
                tl.store(place_at + 1, first, mask=full)
                tl.store(place_at + 2, last, mask=full)
                count += tl.sum(ones, 0)
            tl.store(counts_ptr, count)
            tl.store(counts_ptr + 1, 0)
            tl.store(counts_ptr + 2, 0)
    else:
        end = tl.load(tiles_ptr + 3 * num_slots - 1)  # the last expert has the last slot, which ends where its rows do
        row = (part - 1) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        live = row < end
        token = tl.load(order_ptr + row, mask=live, other=0) // CHOICES
        mask = live[:, None] & (column < SIZE)[None, :]
        values = tl.load(x_ptr + token.to(tl.int64)[:, None] * SIZE + column[None, :], mask=mask)
        tl.store(rows_ptr + row.to(tl.int64)[:, None] * SIZE + column[None, :], values, mask=mask)
        if HAS_SCALE:
            if tl.program_id(1) == 0:
                tl.store(scales_ptr + row, tl.load(scale_ptr + token, mask=live), mask=live)


def sorted_rows(x: Tensor, routes: Routes, choices: int, scale: Tensor | None = None) -> SortedRows:
    """x [T, H], contiguous, of 8 bits an even H; scale float32 [T, 1] of its rows."""
    dtype, x = x.dtype, x.view(torch.int16) if x.element_size() == 1 else x
    pairs, slots, size = len(routes.order), len(routes.tiles), x.shape[1]
    rows = torch.empty(pairs, size, dtype=x.dtype, device=x.device)
    scales = None if scale is None else torch.empty(pairs, dtype=scale.dtype, device=x.device)
    dense = torch.empty_like(routes.tiles)
    counts = torch.empty(3, dtype=torch.int32, device=x.device)
    sorted_rows_kernel[(1 + -(-pairs // ROWS), -(-size // COLUMNS))](
        rows,
        counts if scales is None else scales,
        dense,
        counts,
        x,
        counts if scale is None else scale,
        routes.order,
        routes.tiles,
        slots,
        CHOICES=choices,
        SIZE=size,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        SLOTS=SLOTS,
        HAS_SCALE=scale is not None,
        num_warps=4,
        **dependent(x.device),
    )
    return SortedRows(rows.view(dtype), dense, counts, scales)
