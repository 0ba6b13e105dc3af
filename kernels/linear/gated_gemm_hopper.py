"""Gluon, for Hopper: silu(x @ gate.T) * (x @ up.T) for many rows of x, gate and up being halves of a merged weight's rows.

So the product with both is neither stored nor read again. The grid is persistent, one program a multiprocessor. A program
is a producer, which copies tiles of x and of the weight to shared memory by the bulk copy engine (TMA), and two consumers,
each of which multiplies its rows of a tile. While they store one tile the producer copies the next. Gate and up rows are
two copies into one tile, so that both products of an output lie in one thread.

Where the last round of tiles would leave many programs without work, its tiles are narrower (3/4), so that it is shorter.
Rounds where the product and `silu_mul` round. Knows no models; which sizes it takes is data in `kernels/linear/tiles.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pagegraph.kernels.attention.hopper_tiles import barrier
from pagegraph.kernels.linear.tiles import GATED_COLUMNS, GATED_ROWS
from pagegraph.kernels.pdl import dependent

CONSUMERS = gl.constexpr(2)
BLOCK_M = GATED_ROWS // 2  # rows of x of a consumer
BLOCK_N = 2 * GATED_COLUMNS  # gate rows and up rows of a tile
BLOCK_K = 64
STAGES = 4  # steps along the columns of x in shared memory
GROUP = 16  # rows of tiles that are walked together
REGISTERS = 232  # of a consumer's thread; the producer keeps 40
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def wait_for_kernels(x):
    """As `kernels.pdl.wait`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1
    )


@gluon.jit
def _place(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """(row, column) of a tile: GROUP rows of tiles are walked column by column, so that neighbours share x and weight."""
    of_group = GROUP * tiles_n
    first = tile // of_group * GROUP
    height = gl.minimum(tiles_m - first, GROUP)
    return first + tile % of_group % height, tile % of_group // height


@gluon.jit
def _producer(x, weight, narrow_weight, smem, barriers, tiles_m, tiles_n, whole_n, steps, size, STAGES: gl.constexpr,
              GROUP: gl.constexpr, NARROW: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    x_smem, w_smem, _ = smem
    ready, empty = barriers
    rows: gl.constexpr = x_smem.shape[1]
    block_n: gl.constexpr = w_smem.shape[1]
    block_k: gl.constexpr = w_smem.shape[2]
    half: gl.constexpr = block_n // 2
    part: gl.constexpr = block_n // 8
    if PDL:
        wait_for_kernels(size)
    n = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        is_whole = True
        if NARROW:
            is_whole = tile_n < whole_n
        for step in range(0, steps):
            stage = n % STAGES
            column = step * block_k
            mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
            if is_whole:
                mbarrier.expect(ready.index(stage), (CONSUMERS * rows + block_n) * block_k * 2)
            else:
                mbarrier.expect(ready.index(stage), (CONSUMERS * rows + 6 * part) * block_k * 2)
            for one in gl.static_range(CONSUMERS):
                row = (tile_m * CONSUMERS + one) * rows
                tma.async_copy_global_to_shared(
                    x, [row, column], ready.index(stage), x_smem.index(one * STAGES + stage)
                )
            if is_whole:
                for one in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        weight, [one * size + tile_n * half, column], ready.index(stage),
                        w_smem.index(stage).slice(one * half, half),
                    )  # fmt: skip
            else:
                if NARROW:  # two parts of gate, two of up, then one of each
                    first = whole_n * half + (tile_n - whole_n) * 3 * part
                    for one in gl.static_range(2):
                        for index in gl.static_range(3):
                            tma.async_copy_global_to_shared(
                                narrow_weight, [one * size + first + index * part, column], ready.index(stage),
                                w_smem.index(stage).slice((one * 2 + index if index < 2 else 4 + one) * part, part),
                            )  # fmt: skip
            n += 1


@gluon.jit
def multiply(acc, n, steps, smem, barriers, ONE: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr = False):
    """(x @ weight.T of a tile, steps so far); of x @ weight where that lies transposed."""
    x_smem, w_smem, _ = smem
    ready, empty = barriers
    for step in range(0, steps):
        stage = n % STAGES
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        weight = w_smem.index(stage)
        if not TRANSPOSED:
            weight = weight.permute((1, 0))
        acc = warpgroup_mma(x_smem.index(ONE * STAGES + stage), weight, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        barrier()  # all warps have read the step before
        mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), pred=step > 0)
        n += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    barrier()
    mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES))
    return acc, n


@gluon.jit
def _multiply_narrow(acc, rest, n, steps, smem, barriers, ONE: gl.constexpr, STAGES: gl.constexpr):
    """The same of a narrow tile, in two products, because sizes of tensors are powers of two."""
    x_smem, w_smem, _ = smem
    ready, empty = barriers
    half: gl.constexpr = w_smem.shape[1] // 2
    for step in range(0, steps):
        stage = n % STAGES
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        x = x_smem.index(ONE * STAGES + stage)
        acc = warpgroup_mma(x, w_smem.index(stage).slice(0, half).permute((1, 0)), acc, is_async=True)
        rest = warpgroup_mma(x, w_smem.index(stage).slice(half, half // 2).permute((1, 0)), rest, is_async=True)
        acc, rest = warpgroup_mma_wait(2, deps=[acc, rest])
        barrier()
        mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), pred=step > 0)
        n += 1
    acc, rest = warpgroup_mma_wait(0, deps=[acc, rest])
    barrier()
    mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES))
    return acc, rest, n


@gluon.jit
def rounded(x, DTYPE: gl.constexpr):
    """float32 rounded to DTYPE, two at a time: one at a time, as the compiler has it, would cost 2 % of a GEMM."""
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r", [x], gl.float32, True, 2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 both; .reg .b16 low, high; cvt.rn.f16x2.f32 both, $3, $2; mov.b32 {low, high}, both; "
            "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=r,=r,r,r", [x], gl.float32, True, 2,
        )  # fmt: skip


@gluon.jit
def sigmoid(x, ALPHA: gl.constexpr):
    """1 / (1 + e^(-alpha x)) in three instructions; the compiler's own also handle denormal numbers."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
        "=r,r", [x * (-ALPHA * LOG2E)], gl.float32, True, 1,
    )  # fmt: skip


@gluon.jit
def _gated(product, DTYPE: gl.constexpr):
    """float32 [M, 2 N], gate then up -> DTYPE [M, N]."""
    rows: gl.constexpr = product.shape[0]
    columns: gl.constexpr = product.shape[1] // 2
    gate, up = rounded(product, DTYPE).reshape([rows, 2, columns]).permute((0, 2, 1)).split()
    return (gate * sigmoid(gate, 1.0) * up).to(DTYPE)


@gluon.jit
def _store(out_ptr, value, first_row, first_column, num_rows, size):
    row = first_row + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, value.type.layout))
    column = first_column + gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, value.type.layout))
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    gl.store(out_ptr + row.to(gl.int64)[:, None] * size + column[None, :], value, mask=inside)


@gluon.jit
def _consumer(out, out_ptr, smem, barriers, num_rows, tiles_m, tiles_n, whole_n, steps, size, ONE: gl.constexpr,
              STAGES: gl.constexpr, GROUP: gl.constexpr, NARROW: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    x_smem, w_smem, out_smem = smem
    dtype: gl.constexpr = w_smem.dtype
    rows: gl.constexpr = x_smem.shape[1]
    block_n: gl.constexpr = w_smem.shape[1]
    half: gl.constexpr = block_n // 2
    part: gl.constexpr = block_n // 8
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
    layout_half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n // 2, 16])
    layout_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n // 4, 16])
    out_smem = out_smem.index(ONE)
    if PDL:
        wait_for_kernels(size)
    n = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row = (tile_m * CONSUMERS + ONE) * rows
        is_whole = True
        if NARROW:
            is_whole = tile_n < whole_n
        if is_whole:
            acc = gl.full([rows, block_n], 0.0, gl.float32, layout)
            acc, n = multiply(acc, n, steps, smem, barriers, ONE, STAGES)
            value = _gated(acc, dtype)
            tma.store_wait(0)
            barrier()  # the copy engine has read the tile before
            out_smem.store(value)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(out, [row, tile_n * half], out_smem)
        else:
            if NARROW:
                most = gl.full([rows, block_n // 2], 0.0, gl.float32, layout_half)
                rest = gl.full([rows, block_n // 4], 0.0, gl.float32, layout_rest)
                most, rest, n = _multiply_narrow(most, rest, n, steps, smem, barriers, ONE, STAGES)
                first = whole_n * half + (tile_n - whole_n) * 3 * part
                _store(out_ptr, _gated(most, dtype), row, first, num_rows, size)
                _store(out_ptr, _gated(rest, dtype), row, first + 2 * part, num_rows, size)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "tiles_m", "tiles_n", "whole_n", "steps"])
def gated_gemm_hopper_kernel(
    out,
    out_ptr,
    x,
    weight,
    narrow_weight,
    num_rows,
    tiles_m,
    tiles_n,
    whole_n,  # columns of tiles that are not narrow
    steps,
    size,  # of the output
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    NARROW: gl.constexpr,
    REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_smem = gl.allocate_shared_memory(dtype, [CONSUMERS * STAGES, BLOCK_M, BLOCK_K], shared)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], shared)
    out_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, BLOCK_M, BLOCK_N // 2], shared)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    barrier()
    smem = (x_smem, w_smem, out_smem)
    barriers = (ready, empty)
    gl.warp_specialize(
        [
            (_producer, (x, weight, narrow_weight, smem, barriers, tiles_m, tiles_n, whole_n, steps, size,
                         STAGES, GROUP, NARROW, PDL)),
            (_consumer, (out, out_ptr, smem, barriers, num_rows, tiles_m, tiles_n, whole_n, steps, size, 0,
                         STAGES, GROUP, NARROW, PDL)),
            (_consumer, (out, out_ptr, smem, barriers, num_rows, tiles_m, tiles_n, whole_n, steps, size, 1,
                         STAGES, GROUP, NARROW, PDL)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


def takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether `gated_gemm` computes silu and product of rows [T, K] and weight [2 N, K]: 16-bit types, all rows at whole 16 bytes."""
    return (
        rows.dtype in (torch.bfloat16, torch.float16)
        and rows.dtype == weight.dtype
        and weight.is_contiguous()
        and rows.stride(1) == 1
        and all(count % 8 == 0 for count in (rows.stride(0), rows.shape[1], len(weight) // 2))
        and rows.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def tiles_of(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


def gated_gemm(x: Tensor, weight: Tensor, programs: int, narrow: bool = False) -> Tensor:
    """x [T, K], weight [2 N, K] -> [T, N]; see `takes`. programs: how many run at a time; narrow: tiles of the last round are."""
    count, size = x.shape
    out = torch.empty(count, len(weight) // 2, dtype=x.dtype, device=x.device)
    tiles_m, tiles_n = -(-count // GATED_ROWS), -(-out.shape[1] // GATED_COLUMNS)
    whole_n = tiles_n
    if narrow:
        whole_n = tiles_m * tiles_n // programs * programs // tiles_m
        tiles_n = whole_n + -(-(out.shape[1] - whole_n * GATED_COLUMNS) // (GATED_COLUMNS * 3 // 4))
    gated_gemm_hopper_kernel[(min(tiles_m * tiles_n, programs),)](
        tiles_of(out, BLOCK_M, GATED_COLUMNS),
        out,
        tiles_of(x, BLOCK_M, BLOCK_K),
        tiles_of(weight, GATED_COLUMNS, BLOCK_K),
        tiles_of(weight, GATED_COLUMNS // 4, BLOCK_K),
        count,
        tiles_m,
        tiles_n,
        whole_n,
        -(-size // BLOCK_K),
        out.shape[1],
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        STAGES=STAGES,
        GROUP=GROUP,
        NARROW=narrow,
        REGISTERS=REGISTERS,
        num_warps=4,
        **dependent(x.device),
    )
    return out
