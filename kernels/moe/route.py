"""Triton: pairs of a token and its choice sorted by expert, and the tiles of rows that grouped products take.

One kernel, a program an expert, without counts that programs exchange: each reads all choices, counts those of smaller experts
and its own, and so knows where its rows begin. Its tiles begin at slot `first // BLOCK_M + expert`: enough room for tiles that
are not full, whatever was chosen, so the list has `T * k // BLOCK_M + E` slots, some of them empty, and no count has to come to the
host. Padding rows are sorted nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

MAX_BLOCK = 4096


class Routes(NamedTuple):
    """order int32 [T * k]: pairs, sorted by expert; entries behind the last live pair are not written.

    tiles int32 [slots, 3]: expert, first row in that order, row behind the last; an empty slot's first is not below that.
    """

    order: Tensor
    tiles: Tensor


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])
def route_kernel(
    order_ptr,
    tiles_ptr,
    chosen_ptr,
    live_ptr,
    num_pairs,
    num_slots,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    smaller = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    if PDL:
        wait()
    live = num_pairs
    if HAS_LIVE:
        live = tl.minimum(num_pairs, tl.load(live_ptr) * CHOICES)
    for at in range(0, live, BLOCK):
        ids = tl.load(chosen_ptr + at + lane, mask=at + lane < live, other=EXPERTS).to(tl.int32)
        smaller += ((ids >= 0) & (ids < expert)).to(tl.int32)
        equal += (ids == expert).to(tl.int32)
    first = tl.sum(smaller, 0)
    last = first + tl.sum(equal, 0)
    begin = first // BLOCK_M + expert
    end = last // BLOCK_M + expert + 1
    if expert == EXPERTS - 1:
        end = num_slots
    for at in range(begin, end, BLOCK):
        slot = at + lane
        row = first + (slot - begin) * BLOCK_M
        mine = slot < end
        tl.store(tiles_ptr + 3 * slot, tl.zeros([BLOCK], tl.int32) + expert, mask=mine)
        tl.store(tiles_ptr + 3 * slot + 1, row, mask=mine)
        tl.store(tiles_ptr + 3 * slot + 2, tl.minimum(row + BLOCK_M, last), mask=mine)
    row = first
    for at in range(0, live, BLOCK):
        ids = tl.load(chosen_ptr + at + lane, mask=at + lane < live, other=EXPERTS).to(tl.int32)
        mine = (ids == expert).to(tl.int32)
        rank = tl.cumsum(mine, 0) - mine
        tl.store(order_ptr + row + rank, at + lane, mask=mine != 0)
        row += tl.sum(mine, 0)


def route(chosen: Tensor, experts: int, block_m: int, live: Tensor | None) -> Routes:
    """chosen [T, k], contiguous; live [1]: rows from there on are padding."""
    pairs = chosen.numel()
    slots = pairs // block_m + experts
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty(slots, 3, dtype=torch.int32, device=chosen.device)
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(pairs)))
    route_kernel[(experts,)](
        order,
        tiles,
        chosen,
        live if live is not None else chosen,
        pairs,
        slots,
        CHOICES=chosen.shape[1],
        EXPERTS=experts,
        BLOCK_M=block_m,
        BLOCK=block,
        HAS_LIVE=live is not None,
        num_warps=8 if block >= 2048 else 4,
        **dependent(chosen.device),
    )
    return Routes(order, tiles)
