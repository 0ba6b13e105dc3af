"""What GEMMs with split columns share: each program leaves partial sums of a tile, and the last to arrive adds them in order.

So the result does not depend on timing. Such kernels belong on one stream (`kernels.pdl.arrival_counts`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.pdl import ARRIVALS, arrival_counts

UNROLLED = tl.constexpr(4096)  # up to so many sums of a tile, whose partials are all asked for at once


@triton.jit
def is_last_arriver(
    partial,
    partial_ptr,
    counter_ptr,
    tile,
    split,
    at,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Store a partial sum float32 [BLOCK_N, BLOCK_T], its elements at `at` of a tile -> whether all others have been left before."""
    tl.store(partial_ptr + (split * tl.num_programs(0) + tile) * BLOCK_N * BLOCK_T + at, partial)
    tl.debug_barrier()  # every thread's share is stored before the arrival is counted
    return tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") >= SPLIT_K - 1


@triton.jit
def reduce_partials(
    partial_ptr, counter_ptr, tile, at, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The sum of a tile's partials; its count is 0 again."""
    tl.store(counter_ptr + tile, 0)
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if BLOCK_N * BLOCK_T > UNROLLED:  # registers for one partial at a time
        for other in tl.range(SPLIT_K, num_stages=1):
            total += tl.load(
                partial_ptr + (other * tl.num_programs(0) + tile) * BLOCK_N * BLOCK_T + at, cache_modifier=".cg"
            )
    else:
        for other in tl.static_range(SPLIT_K):
            total += tl.load(
                partial_ptr + (other * tl.num_programs(0) + tile) * BLOCK_N * BLOCK_T + at, cache_modifier=".cg"
            )
    return total


def partial_buffers(tile: Tile, tiles: int, block_t: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """(partials float32 [split_k, tiles, block_n, block_t], counts); `out` stands for both where columns are whole."""
    if tile.split_k == 1:
        return out, out
    if tiles > ARRIVALS:
        raise ValueError(f"{tiles} tiles of split columns: more than {ARRIVALS} counts")
    partials = torch.empty(tile.split_k * tiles * tile.block_n * block_t, dtype=torch.float32, device=out.device)
    return partials, arrival_counts(out.device)
