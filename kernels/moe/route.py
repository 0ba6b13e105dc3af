"""Triton: pairs of a token and its choice sorted by expert, and the tiles of rows that grouped products take.

Of few pairs one kernel, a program an expert, without counts that programs exchange: each reads all choices, counts those of smaller
experts and its own, and so knows where its rows begin. Of many pairs two kernels, whose programs have a part of the pairs each: the
first counts how often each expert is chosen in its part, the second adds those up of experts and parts before its own.

An expert's tiles begin at slot `first // BLOCK_M + expert`: enough room for tiles that are not full, whatever was chosen, so the
list has `T * k // BLOCK_M + E` slots, some of them empty, and no count has to come to the host. Padding rows are sorted nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

MAX_BLOCK = 4096
MANY_PAIRS = 16384  # from which on they are sorted in parts
PART, PARTS_AT_ONCE = 256, 16  # pairs of a part; parts whose counts are added up at once
PAIRS_AT_ONCE = 32  # of a part, that its others are compared with


class Routes(NamedTuple):
    """order int32 [T * k]: pairs, sorted by expert; entries behind the last live pair are not written.

    tiles int32 [slots, 3]: expert, first row in that order, row behind the last; an empty slot's first is not below that.
    """

    order: Tensor
    tiles: Tensor


@triton.jit
def _live_pairs(num_pairs, live_ptr, CHOICES: tl.constexpr, HAS_LIVE: tl.constexpr):
    """How many of the pairs are of no padding."""
    live = num_pairs
    if HAS_LIVE:
        live = tl.minimum(num_pairs, tl.load(live_ptr) * CHOICES)
    return live


@triton.jit
def _chosen_of(chosen_ptr, pair, live, EXPERTS: tl.constexpr):
    """The experts of pairs; EXPERTS where that is none, or a pair is of padding."""
    ids = tl.load(chosen_ptr + pair, mask=pair < live, other=EXPERTS).to(tl.int32)
    return tl.where((ids >= 0) & (ids < EXPERTS), ids, EXPERTS)


@triton.jit
def _write_tiles(
    tiles_ptr, expert, first, last, num_slots, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """Those of an expert whose rows are from `first` up to `last`, and its empty slots."""
    begin = first // BLOCK_M + expert
    end = last // BLOCK_M + expert + 1
    if expert == EXPERTS - 1:
        end = num_slots
    for at in range(begin, end, BLOCK):
        slot = at + tl.arange(0, BLOCK)
        row = first + (slot - begin) * BLOCK_M
        mine = slot < end
        tl.store(tiles_ptr + 3 * slot, tl.zeros([BLOCK], tl.int32) + expert, mask=mine)
        tl.store(tiles_ptr + 3 * slot + 1, row, mask=mine)
        tl.store(tiles_ptr + 3 * slot + 2, tl.minimum(row + BLOCK_M, last), mask=mine)


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
    live = _live_pairs(num_pairs, live_ptr, CHOICES, HAS_LIVE)
    for at in range(0, live, BLOCK):
        ids = _chosen_of(chosen_ptr, at + lane, live, EXPERTS)
        smaller += (ids < expert).to(tl.int32)
        equal += (ids == expert).to(tl.int32)
    first = tl.sum(smaller, 0)
    last = first + tl.sum(equal, 0)
    _write_tiles(tiles_ptr, expert, first, last, num_slots, EXPERTS, BLOCK_M, BLOCK)
    row = first
    for at in range(0, live, BLOCK):
        ids = _chosen_of(chosen_ptr, at + lane, live, EXPERTS)
        mine = (ids == expert).to(tl.int32)
        rank = tl.cumsum(mine, 0) - mine
        tl.store(order_ptr + row + rank, at + lane, mask=mine != 0)
        row += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(
    counts_ptr, chosen_ptr, live_ptr, num_pairs, CHOICES: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr,
    PART: tl.constexpr, HAS_LIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts int32 [parts, EXPERTS]."""
    part = tl.program_id(0)
    if PDL:
        wait()
    live = _live_pairs(num_pairs, live_ptr, CHOICES, HAS_LIVE)
    counts = tl.histogram(_chosen_of(chosen_ptr, part * PART + tl.arange(0, PART), live, EXPERTS), BINS)
    expert = tl.arange(0, BINS)
    tl.store(counts_ptr + part * EXPERTS + expert, counts, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])
def order_kernel(
    order_ptr, tiles_ptr, rows_ptr, counts_ptr, chosen_ptr, live_ptr, num_pairs, num_slots,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr, PAIRS_AT_ONCE: tl.constexpr, HAS_LIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """rows int32 [parts, EXPERTS] is room for the first row of each expert's pairs of a part."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    expert = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    if PDL:
        wait()
    live = _live_pairs(num_pairs, live_ptr, CHOICES, HAS_LIVE)
    for at in range(0, parts, PARTS_AT_ONCE):
        one = at + tl.arange(0, PARTS_AT_ONCE)
        mask = (one < parts)[:, None] & (expert < EXPERTS)[None, :]
        counts = tl.load(counts_ptr + one[:, None] * EXPERTS + expert[None, :], mask=mask, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((one < part)[:, None], counts, 0), 0)
    first = tl.cumsum(total, 0) - total
    tl.store(rows_ptr + part * EXPERTS + expert, first + before, mask=expert < EXPERTS)
    tl.debug_barrier()  # what one thread has written another reads
    for mine in range(part, EXPERTS, parts):
        begin = tl.sum(tl.where(expert == mine, first, 0), 0)
        end = begin + tl.sum(tl.where(expert == mine, total, 0), 0)
        _write_tiles(tiles_ptr, mine, begin, end, num_slots, EXPERTS, BLOCK_M, 128)
    pair = part * PART + tl.arange(0, PART)
    ids = _chosen_of(chosen_ptr, pair, live, EXPERTS)
    rank = tl.zeros([PART], tl.int32)
    for at in range(0, PART, PAIRS_AT_ONCE):
        other = part * PART + at + tl.arange(0, PAIRS_AT_ONCE)
        others = _chosen_of(chosen_ptr, other, live, EXPERTS)
        rank += tl.sum(((ids[:, None] == others[None, :]) & (other[None, :] < pair[:, None])).to(tl.int32), 1)
    row = tl.load(rows_ptr + part * EXPERTS + ids, mask=ids < EXPERTS, other=0) + rank
    tl.store(order_ptr + row, pair, mask=ids < EXPERTS)


def route(chosen: Tensor, experts: int, block_m: int, live: Tensor | None) -> Routes:
    """chosen [T, k], contiguous; live [1]: rows from there on are padding."""
    pairs = chosen.numel()
    slots = pairs // block_m + experts
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty(slots, 3, dtype=torch.int32, device=chosen.device)
    shared = dict(
        CHOICES=chosen.shape[1], EXPERTS=experts, HAS_LIVE=live is not None, **dependent(chosen.device)
    )  # fmt: skip
    live = live if live is not None else chosen
    if pairs >= MANY_PAIRS:
        parts, bins = triton.cdiv(pairs, PART), triton.next_power_of_2(experts + 1)
        counts, rows = torch.empty(2, parts, experts, dtype=torch.int32, device=chosen.device)
        count_kernel[(parts,)](counts, chosen, live, pairs, BINS=bins, PART=PART, num_warps=4, **shared)
        order_kernel[(parts,)](
            order, tiles, rows, counts, chosen, live, pairs, slots, BINS=bins, BLOCK_M=block_m, PART=PART,
            PARTS_AT_ONCE=max(1, PARTS_AT_ONCE * 512 // bins), PAIRS_AT_ONCE=PAIRS_AT_ONCE, num_warps=8, **shared,
        )  # fmt: skip
        return Routes(order, tiles)
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(pairs)))
    route_kernel[(experts,)](
        order, tiles, chosen, live, pairs, slots, BLOCK_M=block_m, BLOCK=block, num_warps=8 if block >= 2048 else 4, **shared
    )  # fmt: skip
    return Routes(order, tiles)
