"""How `pagegraph::repacked_linear` computes each linear on CUDA: data by GPU, kind of weight, shape and rows.

A product of the table was measured by perf/gpu/quantized.py; all others go by a rule of thumb. Knows sizes, kinds
and GPUs, no kernel.

Above 256 rows, where that is faster, a weight is dequantised by one kernel and left to cuBLAS, which costs three
bytes an element (2.5 at 4 bits), spread over the rows. It serves what no GEMM of 8-bit activations takes: float32
activations, int4 in groups of 32 and 64, int8 in groups, fp8 in blocks, and all where the configuration keeps
activations as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from pagegraph.kernels.gpu import OTHERS_TAKE, Gpu
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.quant.reference import ACTIVATION_GROUP
from pagegraph.kernels.quant.weight import Kind, QuantWeight

SINGLE_ROWS = 8  # up to here a tensor-core instruction takes all rows of x at once
MEMORY_BOUND_ROWS = 64  # up to here reading the weight bounds a GEMM
WIDE_ROWS = 256  # above it a weight is dequantised once for all rows
PROGRAMS = 264  # two on each multiprocessor of an H100 or H200
SCALED_ROWS = 16  # what PyTorch's GEMM of two fp8 wants the rows of a weight to be a multiple of
FP8_CAPABILITY = (8, 9)  # compute capability from which on a GPU converts and multiplies e4m3

# gemv: `kernels.quant.gemv`, for few rows; gemm_16bit: `kernels.quant.gemm_16bit` by that tile; dequantize: the weight is
# dequantised, then cuBLAS. Two quantise rows of x to 8 bits: gemm_8bit, `kernels.quant.gemm_8bit` by that tile (W8A8 of int8
# with one scale a row, W4A8 of int4 in groups of multiples of 128); scaled_mm, PyTorch's GEMM of two fp8 with one scale a row.
Way = Literal["gemv", "gemm_16bit", "dequantize", "gemm_8bit", "scaled_mm"]
QUANTIZES_X: tuple[Way, ...] = ("gemm_8bit", "scaled_mm")


class QuantGemvTile(NamedTuple):
    """How a GEMV is cut: 16 rows of the weight to a program, times 1, 2 or 4; warps, each with a block of 64 columns; such steps of a turn; stages."""

    parts: int
    warps: int
    steps: int
    stages: int


class Choice(NamedTuple):
    """One way to compute a linear; `tile` belongs to gemv, gemm_16bit and gemm_8bit."""

    way: Way
    tile: Tile | QuantGemvTile | None = None


def by_gemm_16bit(*sizes: int) -> Choice:
    """By a tile of these sizes, in the order of `Tile`."""
    return Choice("gemm_16bit", Tile(*sizes))


def by_gemv(*sizes: int) -> Choice:
    """By a tile of few rows of these sizes, in the order of `QuantGemvTile`."""
    return Choice("gemv", QuantGemvTile(*sizes))


def by_gemm_8bit(block_n: int, split_k: int, num_warps: int, num_stages: int, block_t: int) -> Choice:
    """With 8 bits on both sides, 128 columns to a step."""
    return Choice("gemm_8bit", Tile(block_n, ACTIVATION_GROUP, split_k, num_warps, num_stages, block_t))


SCALED_MM, DEQUANTIZE = Choice("scaled_mm"), Choice("dequantize")
# GPU -> (kind, N, K) -> rows up to which a choice holds -> choice. Rows above the last go by the rule. 4 bits were measured in groups of 128; smaller groups take the same tiles.
TABLE: dict[Gpu, dict[tuple[Kind, int, int], dict[int, Choice]]] = {
    "H200": {
        ("fp8", 6144, 4096): {8: by_gemv(1, 4, 4, 3), 32: by_gemm_16bit(64, 128, 4, 4, 4), 64: by_gemm_16bit(64, 128, 2, 4, 4), 256: SCALED_MM},
        ("fp8", 4096, 4096): {8: by_gemv(1, 4, 2, 6), 32: by_gemm_16bit(64, 128, 8, 4, 4), 64: by_gemm_16bit(64, 128, 4, 4, 4), 256: SCALED_MM},
        ("fp8", 28672, 4096): {8: by_gemv(2, 2, 2, 6), 32: by_gemm_16bit(128, 128, 1, 4, 4), 256: SCALED_MM},
        ("fp8", 4096, 14336): {8: by_gemv(1, 4, 2, 6), 32: by_gemm_16bit(64, 128, 8, 4, 4), 64: by_gemm_16bit(64, 128, 4, 4, 4), 256: SCALED_MM},
        ("fp8", 128256, 4096): {8: by_gemv(1, 4, 1, 6), 32: by_gemm_16bit(64, 128, 1, 4, 4), 256: SCALED_MM},
        ("int8", 6144, 4096): {8: by_gemv(1, 4, 4, 3), 32: by_gemm_16bit(128, 128, 4, 4, 4), 64: by_gemm_16bit(64, 128, 2, 4, 4), 128: by_gemm_8bit(64, 2, 4, 4, 64), 256: by_gemm_8bit(64, 1, 4, 4, 64), 1024: by_gemm_8bit(64, 1, 4, 3, 128)},
        ("int8", 4096, 4096): {8: by_gemv(1, 4, 2, 6), 32: by_gemm_16bit(64, 128, 8, 4, 4), 64: by_gemm_16bit(64, 128, 4, 4, 4), 128: by_gemm_16bit(64, 128, 2, 4, 4), 256: by_gemm_8bit(64, 2, 4, 4, 128), 1024: by_gemm_8bit(64, 1, 4, 4, 128)},
        ("int8", 28672, 4096): {8: by_gemv(2, 2, 2, 6), 64: by_gemm_16bit(128, 128, 1, 4, 4), 128: by_gemm_8bit(64, 1, 4, 4, 128), 1024: by_gemm_8bit(64, 1, 4, 3, 128)},
        ("int8", 4096, 14336): {8: by_gemv(1, 4, 2, 6), 32: by_gemm_16bit(128, 128, 8, 4, 4), 64: by_gemm_16bit(64, 128, 4, 4, 4), 128: by_gemm_8bit(64, 4, 4, 4, 128), 256: by_gemm_8bit(64, 2, 4, 4, 128), 1024: by_gemm_8bit(64, 1, 4, 4, 128)},
        ("int8", 128256, 4096): {8: by_gemv(1, 4, 1, 6), 64: by_gemm_16bit(256, 128, 1, 8, 3), 1024: by_gemm_8bit(64, 1, 4, 3, 128)},
        ("int4", 6144, 4096): {8: by_gemv(1, 4, 2, 6), 32: by_gemm_16bit(128, 128, 8, 4, 4), 64: by_gemm_16bit(64, 128, 2, 4, 4), 128: by_gemm_16bit(64, 64, 4, 4, 4, 128), 1024: by_gemm_8bit(64, 1, 4, 4, 128)},
        ("int4", 4096, 4096): {8: by_gemv(1, 8, 2, 4), 32: by_gemm_16bit(64, 128, 8, 4, 4), 64: by_gemm_16bit(64, 128, 4, 4, 4), 128: by_gemm_16bit(64, 128, 2, 4, 4), 256: by_gemm_8bit(64, 2, 4, 4, 128), 1024: by_gemm_8bit(64, 1, 4, 4, 128)},
        ("int4", 28672, 4096): {8: by_gemv(4, 2, 2, 4), 32: by_gemm_16bit(256, 128, 2, 8, 3), 64: by_gemm_16bit(128, 128, 1, 4, 4), 256: by_gemm_8bit(64, 1, 4, 4, 64), 1024: by_gemm_8bit(64, 1, 4, 4, 128)},
        ("int4", 4096, 14336): {8: by_gemv(1, 8, 2, 4), 32: by_gemm_16bit(64, 128, 8, 4, 4), 64: by_gemm_16bit(64, 128, 4, 4, 4), 128: by_gemm_8bit(128, 4, 4, 3, 64), 256: by_gemm_8bit(128, 2, 4, 3, 64), 1024: by_gemm_8bit(64, 1, 4, 4, 128)},
        ("int4", 128256, 4096): {8: by_gemm_16bit(64, 128, 1, 4, 4, 64), 32: by_gemm_16bit(256, 128, 1, 8, 3), 64: by_gemm_16bit(128, 128, 1, 4, 4), 256: by_gemm_8bit(64, 1, 4, 4, 128), 1024: by_gemm_8bit(128, 1, 8, 4, 128)},
    },
}  # fmt: skip


def has_gemm_8bit(kind: Kind, group: int, size: int, has_zero: bool) -> bool:
    """Whether `kernels.quant.gemm_8bit` multiplies a weight [N, size] of such groups, with zeros or without."""
    if kind == "int4":
        return group >= size or group % ACTIVATION_GROUP == 0
    return kind == "int8" and group >= size and not has_zero


def takes_8bit_activations(weight: QuantWeight, size: int, dtype: torch.dtype) -> bool:
    """Whether this GPU, or the interpreter, multiplies a repacked weight [out_size, size] with rows of `dtype` quantised to 8 bits."""
    kind, has_zero, device = weight.kind, weight.zero is not None, weight.qweight.device
    if kind == "fp8":
        by_rows = weight.group >= size and not has_zero
        if dtype != torch.bfloat16 or weight.out_size % SCALED_ROWS or not by_rows:
            return False
    elif dtype.itemsize != 2 or not has_gemm_8bit(kind, weight.group, size, has_zero):
        return False
    return kind == "int8" or device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def choice_of(
    kind: Kind,
    rows: int,
    out_size: int,
    size: int,
    quantize_x: bool = False,
    narrow: bool = True,
    gpu: Gpu = OTHERS_TAKE,
) -> Choice:
    """For x [rows, size] @ weight [out_size, size].T; quantize_x: x may be quantised to 8 bits (`takes_8bit_activations`); narrow: x has 16 bits."""
    measured = TABLE[gpu].get((kind, out_size, size), {})
    if limits := [limit for limit in measured if limit >= rows]:
        found = measured[min(limits)]
        if (quantize_x or found.way not in QUANTIZES_X) and (narrow or found.way != "gemv"):
            return found
    if rows <= SINGLE_ROWS and narrow:
        return Choice("gemv", gemv_tile_by_rule(kind, out_size))
    if rows > MEMORY_BOUND_ROWS and quantize_x:
        return SCALED_MM if kind == "fp8" else Choice("gemm_8bit", gemm_8bit_tile_by_rule(kind, rows, out_size, size))
    if rows > WIDE_ROWS:
        return DEQUANTIZE
    return Choice("gemm_16bit", gemm_16bit_tile_by_rule(rows, out_size, size))


def gemv_tile_by_rule(kind: Kind, out_size: int) -> QuantGemvTile:
    """More rows to a program where there are enough for the device."""
    if out_size < 16384:
        return QuantGemvTile(1, 4, 2, 6)
    return QuantGemvTile(4, 2, 2, 4) if kind == "int4" else QuantGemvTile(2, 2, 2, 6)


def gemm_16bit_tile_by_rule(rows: int, out_size: int, size: int) -> Tile:
    """Columns are split where rows of the weight alone do not fill the device."""
    if rows > MEMORY_BOUND_ROWS:  # a tile takes 128 rows of x, so that a weight is dequantised once or twice
        wanted = max(1, PROGRAMS // 2 // (-(-out_size // 128) * -(-rows // 128)))
        split = min(4, 1 << wanted.bit_length() - 1, max(1, size // 512))
        return Tile(128, 64, split, 8, 3, 128)
    wanted = max(1, 2 * PROGRAMS // -(-out_size // 64))
    split = min(8, 1 << wanted.bit_length() - 1, max(1, size // 512))
    return Tile(64, 128, split, 4, 4)


def gemm_8bit_tile_by_rule(kind: Kind, rows: int, out_size: int, size: int) -> Tile:
    """Of many rows; with three stages three programs of int8 share a multiprocessor, which pays where there are many."""
    wanted = max(1, PROGRAMS // (-(-out_size // 64) * -(-rows // 128)))
    split = min(8, 1 << wanted.bit_length() - 1, max(1, size // 512))
    return Tile(64, ACTIVATION_GROUP, split, 4, 3 if split == 1 and kind == "int8" else 4, 128)
