"""Triton: x @ weight.T in which a row of x gives the same bits however many rows there are.

The weight is the left operand of the tensor cores and rows of x are their columns, so that a column is summed alike in a tile of
any width. Columns of the weight are cut into parts whose number follows from its shape alone. A part is added up from left to
right, beginning with zero, then parts in their order: of few rows each part is a program's, and the last to arrive adds them;
of many rows one program goes through all of them. A gate is applied before the product is stored. Tiles and who adds follow from the number of rows, sums do not. Knows no models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.linear.silu_mul import silu_mul, silu_times
from pagegraph.kernels.linear.split_k import is_last_arriver, partial_buffers, reduce_partials
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.pdl import dependent, wait

MULTIPROCESSORS = 132  # of an H100 or H200
MOST_PARTS = 8
LEAST_COLUMNS = 256  # of a part
FEW_ROWS = 64  # up to which reading the weight bounds a product, and parts are always shared out
FEWEST_TILES = 64  # a product of more rows with fewer tiles shares its parts out too
BLOCK_K = 64  # one for all tiles: within a step of it the interpreter's order is its library's
PAIRED = tl.constexpr(8)  # rows of a gate, then those of its up: so each thread of a tensor-core tile holds both
GROUP = tl.constexpr(16)  # tiles of rows that go through the weight side by side, so that both stay in L2


@triton.jit
def _loaded(x_at, weight_at, in_t, in_n, lane, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    if K % BLOCK_K == 0:
        weight = tl.load(weight_at + k, mask=in_n[:, None], other=0.0)
        x = tl.load(x_at + k, mask=in_t[None, :], other=0.0)
    else:
        inside = lane < K - k
        weight = tl.load(weight_at + k, mask=in_n[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_at + k, mask=in_t[None, :] & inside[:, None], other=0.0)
    return weight, x


@triton.jit(do_not_specialize=["num_rows"])
def fixed_gemm_kernel(
    out_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, BLOCK_T)
    group = tl.program_id(0) // (GROUP * tl.cdiv(N, BLOCK_N))
    within = tl.program_id(0) % (GROUP * tl.cdiv(N, BLOCK_N))
    side_by_side = min(row_tiles - group * GROUP, GROUP)
    n = within // side_by_side * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (group * GROUP + within % side_by_side) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_n, in_t = n < N, t < num_rows
    if GATED:
        n = n // (2 * PAIRED) * PAIRED + n % PAIRED + n // PAIRED % 2 * (N // 2)
    lane = tl.arange(0, BLOCK_K)
    span: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    weight_at = weight_ptr + n.to(tl.int64)[:, None] * K + lane[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + lane[:, None]
    if PDL:
        wait()
    part = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if SPREAD or PARTS == 1:
        begin = tl.program_id(1) * span
        for k in range(begin, min(begin + span, K), BLOCK_K):
            weight, x = _loaded(x_at, weight_at, in_t, in_n, lane, k, K, BLOCK_K)
            part = tl.dot(weight, x, part, input_precision=PRECISION)
        total = part
    else:
        total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for k in range(0, K, BLOCK_K):  # one loop for all parts: loads run ahead across their borders
            if k % span == 0:
                total += part
                part = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            weight, x = _loaded(x_at, weight_at, in_t, in_n, lane, k, K, BLOCK_K)
            part = tl.dot(weight, x, part, input_precision=PRECISION)
        total += part
    if SPREAD:
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if not is_last_arriver(
            total, partial_ptr, counter_ptr, tl.program_id(0), tl.program_id(1), at, PARTS, BLOCK_N, BLOCK_T
        ):
            return
        total = reduce_partials(partial_ptr, counter_ptr, tl.program_id(0), at, PARTS, BLOCK_N, BLOCK_T)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    if GATED:
        # Rounded as a product of its own would be, then as `silu_mul` does.
        both = total.to(dtype).to(tl.float32).reshape(BLOCK_N // (2 * PAIRED), 2, PAIRED, BLOCK_T).permute(0, 2, 3, 1)
        gate, up = tl.split(both)
        total = silu_times(gate, up).reshape(BLOCK_N // 2, BLOCK_T)
        n = within // side_by_side * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        in_n = n < N // 2
    out_at = out_ptr + t.to(tl.int64)[None, :] * (N // 2 if GATED else N) + n[:, None]
    tl.store(out_at, total.to(dtype), mask=in_n[:, None] & in_t[None, :])


class Cut(NamedTuple):
    """How a product is cut: its tile, and whether each part is a program's."""

    tile: Tile
    spread: bool


def parts_of(out_size: int, size: int) -> int:
    """Parts of the columns of a weight [out_size, size], whatever the rows: so many that few rows fill the multiprocessors."""
    return max(1, min(MULTIPROCESSORS // -(-out_size // 64), MOST_PARTS, size // LEAST_COLUMNS))


# Tiles of more than FEW_ROWS rows in 16-bit types: (weight rows, rows of x, warps, stages) and the fewest tiles that a product
# must have to be cut so; the widest of one part alone, because the sum of parts needs registers of its own.
WIDEST = (128, 256, 8, 4)
WIDEST_TILES = 4 * MULTIPROCESSORS
WIDE = ((128, 128, 8, 4), (128, 64, 4, 4))


def cut_of(rows: int, out_size: int, size: int, element_size: int) -> Cut:
    """How x [rows, size] @ weight [out_size, size].T is cut."""
    parts = parts_of(out_size, size)

    def tiles(block_n: int, block_t: int) -> int:
        return -(-out_size // block_n) * -(-rows // block_t)

    if element_size != 2:
        tile = Tile(64, 32, parts, 4, 3, 32)
    elif rows <= FEW_ROWS:
        block_t = max(16, triton.next_power_of_2(rows))
        tile = Tile(64, BLOCK_K, parts, 4, 8 if block_t < 64 else 6, block_t)
    elif parts == 1 and rows >= WIDEST[1] and tiles(*WIDEST[:2]) >= WIDEST_TILES:
        tile = _tile(WIDEST, parts)
    else:
        found = next((one for one in WIDE if tiles(*one[:2]) >= FEWEST_TILES), (64, 64, 4, 6))
        tile = _tile(found, parts)
    spread = parts > 1 and (rows <= FEW_ROWS or tiles(tile.block_n, tile.block_t) < FEWEST_TILES)
    return Cut(tile, spread)


def _tile(cut: tuple[int, int, int, int], parts: int) -> Tile:
    block_n, block_t, num_warps, num_stages = cut
    return Tile(block_n, BLOCK_K, parts, num_warps, num_stages, block_t)


def fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
    """See `kernels.ops`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    joined = gated and len(weight) % (2 * PAIRED.value) == 0
    cut = cut_of(len(rows), *weight.shape, weight.element_size())
    out = fixed_gemm(rows, weight.contiguous(), bias, *cut, gated=joined).view(*x.shape[:-1], -1)
    return silu_mul(out) if gated and not joined else out


def fixed_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, spread: bool, gated: bool = False) -> Tensor:
    """x [T, K] (rows dense), weight [N, K] contiguous, bias [N] -> [T, N] in x's dtype; bits follow from the tile's split_k alone.

    spread: each part is a program's. gated: silu(first half) * second half of the result, [T, N / 2]; N a multiple of 16.
    """
    out_size, size = weight.shape
    out = torch.empty(len(x), out_size // 2 if gated else out_size, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(out_size, tile.block_n) * triton.cdiv(len(x), tile.block_t)
    partial, counters = partial_buffers(tile, programs, tile.block_t, out) if spread else (out, out)
    fixed_gemm_kernel[programs, tile.split_k if spread else 1](
        out,
        partial,
        counters,
        x,
        weight,
        bias if bias is not None else weight,
        len(x),
        x.stride(0),
        N=out_size,
        K=size,
        BLOCK_T=tile.block_t,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PARTS=tile.split_k,
        SPREAD=spread,
        HAS_BIAS=bias is not None,
        GATED=gated,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent(x.device),
    )
    return out
