"""How the products of experts are cut, by a rule. Knows sizes only.

The rule is what perf/gpu/experts.py found fastest on an H200, or within 3 % of it, for 128 experts of 768 x 2048 and 32 of
2880 x 2880; of FP8 with blocks of scales others are up to 10 % faster from 64 rows an expert on.
"""

from __future__ import annotations

from typing import NamedTuple

from pagegraph.kernels.quant.tiles import QuantGemvTile
from pagegraph.kernels.quant.weight import Kind

MAX_GEMV_TOKENS = 8  # above it experts are chosen more than once often enough
HOPPER_ROWS = 16  # an expert, on average, from which on `grouped_gemm_hopper` is taken
HOPPER_BLOCK_M = 128  # rows of its tiles
E4M3_PAIRS = 64  # from which on it is taken with rows of e4m3, where those for few tokens are not
MAX_TRANSPOSED_TOKENS = 1  # a program of such a product reads short pieces of rows


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


class HopperTiles(NamedTuple):
    """Of the two products by `grouped_gemm_hopper`: pipeline stages; columns of the product (gate and up both counted)."""

    stages: int = 4
    block_n: int = 256


class QuantGemvTiles(NamedTuple):
    """Of the two products of a few tokens by quantised weights."""

    up: QuantGemvTile
    down: QuantGemvTile


Size = tuple[int, int, int, int]  # experts, I, H, bytes an element
QuantSize = tuple[Kind, int, int, int]  # kind of the weights, experts, I, H


def gemv_tiles_of(tokens: int, size: Size, transposed: bool = False) -> GemvTiles | None:
    """Tiles of products without tensor cores; None: more tokens than these are for."""
    if tokens > (MAX_TRANSPOSED_TOKENS if transposed else MAX_GEMV_TOKENS):
        return None
    if transposed:  # neighbours in memory are columns of the result: a sector of 32 bytes at least
        return GemvTiles(GemvTile(16, 128, 4), GemvTile(16, 128, 4, 4))
    return GemvTiles(GemvTile(2, 1024 if size[2] >= 1024 else 256, 4), GemvTile(2, 256, 2, 8))


def grouped_tiles_of(pairs: int, size: Size) -> GroupedTiles:
    """Tiles of grouped products of so many pairs of a token and its choice."""
    mean = -(-pairs // size[0])
    if size[3] > 2:
        tile = GroupedTile(64, 32, 4, 3)
        return GroupedTiles(16 if mean <= 16 else 64, 2, tile, tile)
    # About twice the mean: an expert of more rows than a tile has its weights read once more.
    if mean <= 8:
        tile = GroupedTile(128, 64, 4, 3)
        return GroupedTiles(16, 4, tile, tile)
    if mean <= 16:
        tile = GroupedTile(128, 128, 4, 3)
        return GroupedTiles(32, 2, tile, tile)
    if mean <= 32:
        tile = GroupedTile(128, 64, 4, 4)
        return GroupedTiles(64, 2, tile, tile)
    tile = GroupedTile(256, 64, 8, 3)
    return GroupedTiles(128, 1, tile, tile)


def hopper_tiles_of(pairs: int, experts: int) -> HopperTiles | None:
    """Tiles of `grouped_gemm_hopper`; None: so few pairs that others are faster."""
    return HopperTiles() if pairs >= HOPPER_ROWS * experts else None


def e4m3_tiles_of(pairs: int) -> HopperTiles | None:
    """As `hopper_tiles_of`, of rows and weights of e4m3: half the bytes of a step, which is twice as long."""
    return HopperTiles() if pairs >= E4M3_PAIRS else None


def quant_gemv_tiles_of(tokens: int, size: QuantSize) -> QuantGemvTiles | None:
    """As `gemv_tiles_of`, of quantised weights."""
    if tokens > MAX_GEMV_TOKENS:
        return None
    if size[0] == "fp8" or tokens in (3, 4):
        return QuantGemvTiles(QuantGemvTile(1, 4, 1, 4), QuantGemvTile(1, 8, 1, 6))
    if tokens <= 2:
        return QuantGemvTiles(QuantGemvTile(1, 4, 2, 4), QuantGemvTile(1, 8, 2, 4))
    return QuantGemvTiles(QuantGemvTile(2, 4, 2, 4), QuantGemvTile(2, 8, 1, 4))


def quant_grouped_tiles_of(pairs: int, size: QuantSize, wide: bool) -> GroupedTiles:
    """As `grouped_tiles_of`, of quantised weights: block_n is rows of the weight, a multiple of 64, as block_k is. wide: x is float32."""
    mean = -(-pairs // size[1])
    if wide:
        tile = GroupedTile(64, 64, 4, 2)
        return GroupedTiles(16, 2, tile, tile)
    if size[0] == "mxfp4":
        tile = GroupedTile(128, 64, 4, 4)
        if mean > 128:
            return GroupedTiles(128, 1, *2 * (GroupedTile(256, 64, 8, 3),))
        return GroupedTiles(16, 4, tile, tile) if mean <= 16 else GroupedTiles(64, 3 if mean <= 32 else 2, tile, tile)
    if mean <= 16:
        tile = GroupedTile(128, 128, 4, 4)
        return GroupedTiles(16, 2, tile, tile)
    if mean <= 32:
        tile = GroupedTile(64, 128, 4, 4)
        return GroupedTiles(32, 3, tile, tile)
    tile = GroupedTile(128, 128, 4, 3)
    return GroupedTiles(64, 2, tile, tile)
