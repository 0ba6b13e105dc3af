"""Which products of few rows `skinny_linear` computes, and how each is cut: data, measured by perf/tune_linear.py.

Products that are not in the table go by a rule of thumb. Knows sizes only.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_ROWS = 64  # above it cuBLAS's tiles are full


class Tile(NamedTuple):
    """How one product is cut: weight rows and columns of a step, splits of the columns, warps, pipeline stages."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


# (N, K) -> rows up to which the tile holds -> tile, None where cuBLAS was faster. One NVIDIA H200, bfloat16.
TABLE: dict[tuple[int, int], dict[int, Tile | None]] = {}


def tile_of(rows: int, out_size: int, size: int) -> Tile | None:
    """The tile of x [rows, size] @ weight [out_size, size].T in 16-bit types; None: leave it to cuBLAS."""
    if rows > MAX_ROWS:
        return None
    if (measured := TABLE.get((out_size, size))) is not None:
        return measured[min(limit for limit in measured if limit >= rows)]
    if rows > 16 or size % 64:
        return None
    block_n = 32 if out_size >= 4096 else 16
    wanted = max(1, 264 // (out_size // block_n))
    split = min(8, 1 << wanted.bit_length() - 1, max(1, size // 256))
    return Tile(block_n, 256 if size % 256 == 0 else 64, split, 4, 4)
