"""How the products of experts are cut: data by GPU, with a rule for sizes that were not measured. Knows sizes only.

No size is measured yet: perf/gpu/experts.py measures, the tables take what it finds.
"""

from __future__ import annotations

from typing import NamedTuple

from pagegraph.kernels.gpu import OTHERS_TAKE, Gpu
from pagegraph.kernels.quant.tiles import QuantGemvTile
from pagegraph.kernels.quant.weight import Kind

MAX_GEMV_TOKENS = 8  # above it experts are chosen more than once often enough


class GemvTile(NamedTuple):
    """Columns of the result and of the weight of a step, warps, choices asked for at once (of the second product)."""

    block_n: int
    block_k: int
    num_warps: int
    ahead: int = 1


class GemvTiles(NamedTuple):
    """Of the two products of a few tokens."""

    up: GemvTile
    down: GemvTile


class GroupedTile(NamedTuple):
    """Columns of the product (gate and up both counted) and of the weight of a step, warps, pipeline stages."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class GroupedTiles(NamedTuple):
    """Rows of a tile, of both products; programs that share a multiprocessor; the two products."""

    block_m: int
    programs: int
    up: GroupedTile
    down: GroupedTile


class QuantGemvTiles(NamedTuple):
    """Of the two products of a few tokens by quantised weights."""

    up: QuantGemvTile
    down: QuantGemvTile


Size = tuple[int, int, int, int]  # experts, I, H, bytes an element
QuantSize = tuple[Kind, int, int, int]  # kind of the weights, experts, I, H

# GPU -> size -> tokens up to which it holds -> tiles.
GEMV_TABLE: dict[Gpu, dict[Size, dict[int, GemvTiles | None]]] = {"H200": {}}  # None: the grouped products are faster
# GPU -> size -> rows an expert has in the mean, up to which it holds -> tiles.
GROUPED_TABLE: dict[Gpu, dict[Size, dict[int, GroupedTiles]]] = {"H200": {}}

# The same of quantised weights, where block_n of the grouped products is rows of the weight, a multiple of 64, and block_k too.
QUANT_GEMV_TABLE: dict[Gpu, dict[QuantSize, dict[int, QuantGemvTiles | None]]] = {"H200": {}}
QUANT_GROUPED_TABLE: dict[Gpu, dict[QuantSize, dict[int, GroupedTiles]]] = {"H200": {}}


def gemv_tiles_of(tokens: int, size: Size, transposed: bool = False, gpu: Gpu = OTHERS_TAKE) -> GemvTiles | None:
    """Tiles of products without tensor cores; None: more tokens than these are for."""
    measured = GEMV_TABLE[gpu].get(size, {})
    if (limit := min((limit for limit in measured if limit >= tokens), default=None)) is not None:
        return measured[limit]
    if tokens > MAX_GEMV_TOKENS:
        return None
    if transposed:  # neighbours in memory are columns of the result: a sector of 32 bytes at least
        return GemvTiles(GemvTile(16, 128, 4), GemvTile(16, 128, 4, 4))
    hidden = size[2]
    return GemvTiles(GemvTile(4, 512 if hidden >= 512 else 128, 4), GemvTile(4, 256, 4, 4))


def grouped_tiles_of(pairs: int, size: Size, gpu: Gpu = OTHERS_TAKE) -> GroupedTiles:
    """Tiles of grouped products of so many pairs of a token and its choice."""
    mean = -(-pairs // size[0])
    measured = GROUPED_TABLE[gpu].get(size, {})
    if (limit := min((limit for limit in measured if limit >= mean), default=None)) is not None:
        return measured[limit]
    if size[3] > 2:
        tile = GroupedTile(64, 32, 4, 3)
        return GroupedTiles(16 if mean <= 16 else 64, 2, tile, tile)
    if mean <= 16:
        return GroupedTiles(16, 2, GroupedTile(128, 64, 4, 5), GroupedTile(128, 64, 4, 5))
    if mean <= 32:
        return GroupedTiles(32, 2, GroupedTile(128, 64, 4, 5), GroupedTile(128, 64, 4, 5))
    if mean <= 64:
        return GroupedTiles(64, 2, GroupedTile(128, 64, 4, 4), GroupedTile(128, 64, 4, 4))
    return GroupedTiles(128, 2, GroupedTile(128, 64, 8, 3), GroupedTile(128, 64, 8, 3))


def quant_gemv_tiles_of(tokens: int, size: QuantSize, gpu: Gpu = OTHERS_TAKE) -> QuantGemvTiles | None:
    """As `gemv_tiles_of`, of quantised weights."""
    measured = QUANT_GEMV_TABLE[gpu].get(size, {})
    if (limit := min((limit for limit in measured if limit >= tokens), default=None)) is not None:
        return measured[limit]
    return None if tokens > MAX_GEMV_TOKENS else QuantGemvTiles(QuantGemvTile(1, 4, 2, 4), QuantGemvTile(1, 8, 2, 4))


def quant_grouped_tiles_of(pairs: int, size: QuantSize, wide: bool, gpu: Gpu = OTHERS_TAKE) -> GroupedTiles:
    """As `grouped_tiles_of`, of quantised weights. wide: x is float32."""
    mean = -(-pairs // size[1])
    measured = QUANT_GROUPED_TABLE[gpu].get(size, {})
    if not wide and (limit := min((limit for limit in measured if limit >= mean), default=None)) is not None:
        return measured[limit]
    if wide:
        tile = GroupedTile(64, 64, 4, 2)
        return GroupedTiles(16, 2, tile, tile)
    if mean <= 32:
        tile = GroupedTile(64, 128, 4, 4)
        return GroupedTiles(16 if mean <= 16 else 32, 3, tile, tile)
    if mean <= 64:
        tile = GroupedTile(128, 64, 4, 4)
        return GroupedTiles(64, 2, tile, tile)
    tile = GroupedTile(128, 64, 8, 3)
    return GroupedTiles(128, 1, tile, tile)
