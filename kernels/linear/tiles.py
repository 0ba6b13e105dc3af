"""Which GEMMs kernels of ours compute, and how each is cut: data, of few rows measured by perf/tune/linear_tiles.py.

Products that are not in a table go by a rule of thumb. Knows sizes only.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pagegraph.kernels.gpu import OTHERS_TAKE, Gpu

MAX_ROWS = 64  # above it cuBLAS's tiles are full


class Tile(NamedTuple):
    """How one GEMM is cut: weight rows and columns of a step, splits of the columns, warps, pipeline stages, rows of x at most."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    block_t: int = MAX_ROWS


class GemvTile(NamedTuple):
    """How a GEMV, of one to four rows, is cut: weight rows and columns of a step, warps, steps asked for at once."""

    block_n: int
    block_k: int
    num_warps: int
    ahead: int = 1


# GPU -> (N, K) -> rows up to which the tile holds -> tile, None where cuBLAS was faster. In bfloat16.
TABLE: dict[Gpu, dict[tuple[int, int], dict[int, Tile | None]]] = {
    "H200": {
        (4096, 1024): {2: None, 8: Tile(32, 128, 1, 4, 6), 16: Tile(32, 128, 1, 4, 6), 32: None, 64: None},
        (1024, 2048): {
            2: Tile(32, 128, 4, 4, 4),
            8: Tile(32, 128, 4, 4, 4),
            16: Tile(32, 128, 4, 4, 4),
            32: Tile(32, 128, 4, 4, 4),
            64: None,
        },
        (6144, 1024): {
            2: Tile(64, 128, 1, 4, 5),
            8: Tile(64, 128, 1, 4, 5),
            16: Tile(64, 128, 1, 4, 5),
            32: Tile(64, 128, 1, 4, 4),
            64: None,
        },
        (1024, 3072): {
            2: Tile(64, 128, 8, 4, 3),
            8: Tile(64, 128, 8, 4, 3),
            16: Tile(64, 128, 8, 4, 3),
            32: Tile(32, 256, 4, 4, 3),
            64: Tile(32, 128, 4, 4, 4),
        },
        (151936, 1024): {
            2: Tile(64, 128, 1, 4, 5),
            8: Tile(64, 128, 1, 4, 5),
            16: Tile(64, 128, 1, 4, 5),
            32: Tile(128, 64, 1, 4, 5),
            64: Tile(64, 64, 1, 4, 6),
        },
        (6144, 4096): {
            2: Tile(64, 128, 1, 4, 5),
            8: Tile(64, 128, 1, 4, 5),
            16: Tile(64, 128, 1, 4, 5),
            32: Tile(64, 128, 1, 4, 4),
            64: None,
        },
        (4096, 4096): {
            2: Tile(64, 128, 2, 4, 5),
            8: Tile(64, 64, 4, 4, 6),
            16: Tile(64, 128, 2, 4, 5),
            32: Tile(64, 128, 2, 4, 4),
            64: None,
        },
        (28672, 4096): {
            2: None,
            16: Tile(64, 128, 1, 4, 5),
            64: Tile(128, 64, 1, 4, 5),
        },
        (4096, 14336): {16: None, 64: Tile(64, 128, 2, 4, 5)},
        (128256, 4096): {
            2: Tile(64, 128, 1, 4, 5),
            8: Tile(32, 128, 1, 4, 6),
            16: Tile(64, 128, 1, 4, 5),
            32: Tile(64, 128, 1, 4, 4),
            64: Tile(128, 64, 1, 4, 4),
        },
        (18560, 4096): {16: Tile(64, 64, 2, 4, 6), 64: None},
        (4096, 8192): {
            8: Tile(64, 128, 4, 4, 5),
            16: Tile(64, 128, 2, 4, 5),
            32: Tile(64, 128, 4, 4, 4),
            64: Tile(64, 128, 4, 4, 3),
        },
        (21504, 4096): {8: None, 16: Tile(64, 128, 1, 4, 5), 64: None},
        (4096, 21504): {16: Tile(64, 128, 2, 4, 5), 64: None},
        (131072, 4096): {16: Tile(64, 64, 1, 4, 6), 32: Tile(128, 64, 1, 4, 5), 64: Tile(128, 64, 1, 4, 4)},
        (5120, 2880): {64: None},
        (2880, 4096): {8: Tile(64, 64, 4, 4, 6), 16: Tile(64, 64, 8, 4, 6), 32: Tile(32, 256, 4, 4, 3), 64: None},
        (32, 2880): {16: Tile(64, 64, 16, 4, 2), 64: None},
        (201088, 2880): {16: Tile(64, 64, 1, 4, 6), 32: Tile(128, 64, 1, 4, 5), 64: Tile(128, 64, 1, 4, 4)},
        (5120, 2048): {64: None},
        (2048, 4096): {16: Tile(64, 128, 8, 4, 4), 32: Tile(32, 128, 4, 4, 6), 64: None},
        (128, 2048): {16: Tile(32, 128, 8, 4, 2), 64: Tile(16, 256, 4, 4, 2)},
        (151936, 2048): {8: Tile(64, 128, 1, 4, 5), 16: Tile(128, 64, 1, 4, 6), 32: Tile(128, 64, 1, 4, 5), 64: None},
        (12288, 2048): {32: Tile(64, 64, 1, 4, 6), 64: None},
        (12352, 2048): {32: Tile(64, 64, 1, 4, 6), 64: None},  # as the one before, of which it has 64 rows more
        (9216, 2048): {64: None},
        (64, 2048): {32: Tile(32, 128, 8, 4, 2), 64: Tile(16, 256, 4, 4, 2)},
        (512, 2048): {32: Tile(32, 128, 8, 4, 2), 64: None},
        (2048, 512): {16: Tile(16, 256, 1, 4, 2), 64: None},
    },
}


def tile_of(rows: int, out_size: int, size: int, gpu: Gpu = OTHERS_TAKE) -> Tile | None:
    """The tile of x [rows, size] @ weight [out_size, size].T in 16-bit types; None: leave it to cuBLAS."""
    if rows > MAX_ROWS:
        return None
    if (measured := TABLE[gpu].get((out_size, size))) is not None:
        return measured[min(limit for limit in measured if limit >= rows)]
    if rows > 16 or size % 64:
        return None
    many = out_size >= 4096
    block_n, block_k = (64, 128) if many else (16, 256)
    wanted = max(1, 264 // -(-out_size // block_n))
    split = min(8, 1 << wanted.bit_length() - 1, max(1, size // 256))
    return Tile(block_n, block_k if size % block_k == 0 else 64, split, 4, 5 if many else 4)


MAX_SINGLE_ROWS = 4  # above it the tensor cores are worth its padding
FEWER_ROWS, MANY_WEIGHTS = 2, 12 << 20  # as many rows of weights of so many elements, but where it was measured

# The same for GEMVs, without tensor cores, with what stands around them. Those of up to two rows are cut so
# that one is fast, the commonest, and two are not slow; None where cuBLAS and kernels of their own for norm and gate are faster.
# Those of one row of the 0.6B were chosen by the time of a whole step, in which kernels overlap, not of the product.
GEMV_TABLE: dict[Gpu, dict[tuple[int, int], dict[int, GemvTile | None]]] = {
    "H200": {
        (4096, 1024): {2: GemvTile(4, 1024, 2), 4: GemvTile(8, 512, 2)},
        (1024, 2048): {2: GemvTile(4, 1024, 4, 2), 4: GemvTile(1, 2048, 8)},
        (6144, 1024): {2: GemvTile(2, 512, 2), 4: None},
        (1024, 3072): {2: GemvTile(1, 1024, 4, 3), 4: GemvTile(4, 2048, 8)},
        (151936, 1024): {2: GemvTile(4, 256, 1), 4: GemvTile(8, 256, 1)},
        (6144, 4096): {2: GemvTile(4, 1024, 4), 4: None},
        (4096, 4096): {2: GemvTile(2, 1024, 4), 4: None},
        (28672, 4096): {2: GemvTile(2, 1024, 4), 4: None},
        (4096, 14336): {2: GemvTile(2, 2048, 8), 4: None},
        (128256, 4096): {2: GemvTile(4, 512, 2), 4: GemvTile(8, 256, 1)},
        (5120, 2048): {2: GemvTile(4, 512, 2, 2), 4: GemvTile(2, 1024, 4)},
        (2048, 4096): {2: GemvTile(4, 2048, 8), 4: GemvTile(2, 1024, 4)},
        (18560, 4096): {2: GemvTile(4, 512, 2), 4: None},
        (4096, 8192): {2: GemvTile(1, 2048, 8), 4: GemvTile(4, 512, 2, 2)},
        (21504, 4096): {2: GemvTile(1, 1024, 4), 4: None},
        (4096, 21504): {2: GemvTile(1, 1024, 4, 2), 4: None},
        (131072, 4096): {2: GemvTile(4, 2048, 8, 2), 4: GemvTile(8, 256, 1)},
        (5120, 2880): {2: GemvTile(4, 1024, 4), 4: None},
        (2880, 4096): {2: GemvTile(1, 1024, 4, 2), 4: GemvTile(4, 1024, 4)},
        (32, 2880): {2: GemvTile(1, 2048, 8), 4: GemvTile(1, 1024, 4, 2)},
        (201088, 2880): {2: GemvTile(2, 512, 2, 2), 4: GemvTile(8, 256, 1)},
        (128, 2048): {2: GemvTile(1, 1024, 4, 2), 4: GemvTile(1, 1024, 4, 2)},
        (151936, 2048): {2: GemvTile(2, 512, 2, 2), 4: None},
        (12288, 2048): {2: GemvTile(4, 512, 2, 2), 4: None},
        (12352, 2048): {2: GemvTile(4, 512, 2, 2), 4: None},  # as the one before
        (9216, 2048): {2: GemvTile(4, 1024, 4), 4: None},
        (64, 2048): {2: GemvTile(1, 2048, 8), 4: GemvTile(1, 2048, 8)},
        (512, 2048): {2: GemvTile(2, 2048, 8), 4: GemvTile(2, 2048, 8)},
        (2048, 512): {2: GemvTile(4, 512, 2), 4: GemvTile(4, 256, 1, 2)},
    },
}


def gemv_tile_of(
    rows: int, out_size: int, size: int, gpu: Gpu = OTHERS_TAKE, *, gated: bool = False
) -> GemvTile | None:
    """The GEMV tile of [rows, size] x [out_size, size] without tensor cores; None: more rows than it pays for, or rows not aligned."""
    if rows > MAX_SINGLE_ROWS or size % 8:
        return None
    if (measured := GEMV_TABLE[gpu].get((out_size, size))) is not None:
        return measured[min(limit for limit in measured if limit >= rows)]
    if rows > FEWER_ROWS and out_size * size >= MANY_WEIGHTS:
        return None
    wide = size >= 1024
    return GemvTile(1 if gated else 2, 1024 if wide else 512, 4 if wide else 2)


GATED_ROWS, GATED_COLUMNS = 128, 128  # a tile of `gated_gemm_hopper`: rows of x, columns of the output

LastRound = Literal["whole", "narrow"]  # the tiles of the last round

# GPU -> (N, K) of a merged gate and up -> rows up to which it holds -> the last round, None where cuBLAS with `silu_mul` was
# as fast. In bfloat16, measured by perf/tune/gated_rows.py in the chain of a layer at the power limit.
GATED_TABLE: dict[Gpu, dict[tuple[int, int], dict[int, LastRound | None]]] = {
    "H200": {
        (28672, 4096): {
            96: None,
            128: "whole",
            216: None,
            256: "narrow",
            384: None,
            448: "narrow",
            768: None,
            1024: "whole",
            1280: "narrow",
            1536: None,
        },
    },
}


def last_round_of(rows: int, out_size: int, size: int, programs: int, gpu: Gpu = OTHERS_TAKE) -> LastRound | None:
    """How `gated_gemm_hopper` ends x [rows, size] @ weight [out_size, size].T where so many programs run at a time; None: cuBLAS.

    Beyond the table it wins where rounds of tiles are full, because the product need not be read again: by 2 to 25 % of six
    shapes from 6144 x 1024 to 57344 x 8192.
    """
    measured = GATED_TABLE[gpu].get((out_size, size), {})
    if (limit := min((limit for limit in measured if limit >= rows), default=None)) is not None:
        return measured[limit]
    tiles = -(-rows // GATED_ROWS) * -(-out_size // (2 * GATED_COLUMNS))
    full = tiles >= 0.95 * programs * -(-tiles // programs)
    return "whole" if rows >= 448 and size >= 1024 and full else None
