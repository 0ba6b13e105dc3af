"""Gluon, for Hopper: the grouped products of rows sorted by expert, in 16 bits or of e4m3; both operands come by the bulk copy engine (TMA).

The grid is persistent, one program a multiprocessor, and takes the next tile until none is left: tiles of few rows are short, so
which program has time is not known before. A program is a producer, which copies tiles of the sorted rows and of the stack of
weights, seen as one matrix of all experts' rows, to shared memory, and two consumers, each of which multiplies 64 rows of a tile.
The producer tells them which tile it is. A tile begins at any row, so it may reach into rows of the next expert, or into ones that
nobody wrote: these are multiplied and not stored. Where a tile has 64 rows or fewer the second consumer lets it pass; where it has
few, no more than those are copied, and what is left of other tiles is multiplied with them.

Of e4m3, where rows and weights have a scale for each row, tensor cores add up a whole row with fewer bits than float32 has, as
PyTorch's product of fp8 linears does, and sums are scaled behind that. Of every 16 rows of a first weight 8 are of gate and 8 of up,
which one thread then holds both of.

Rounds where `grouped_gemm` rounds, and stores where that stores: the first product by the order of experts, the second by pair.
The products themselves are `kernels.linear.gated_gemm_hopper`'s. Knows of routing the list of tiles alone, and not who rounds rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from pagegraph.kernels.attention.hopper_tiles import barrier
from pagegraph.kernels.gpu import multiprocessors
from pagegraph.kernels.linear.gated_gemm_hopper import (
    BLOCK_K,
    CONSUMERS,
    multiply,
    rounded,
    sigmoid,
    tiles_of,
    wait_for_kernels,
)
from pagegraph.kernels.moe.activation import activate, limited
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.moe.route import Routes
from pagegraph.kernels.moe.sorted_rows import SortedRows
from pagegraph.kernels.moe.tiles import HOPPER_BLOCK_M, HopperTiles
from pagegraph.kernels.pdl import dependent

BLOCK_M = HOPPER_BLOCK_M // 2  # rows of a consumer
FEW = 16  # rows of a tile that are copied alone
REGISTERS = 224  # of a consumer's thread; the producer keeps 56
TOLD = gl.constexpr(8)  # tiles that the producer may have told of: more than it runs ahead, by a step each


@gluon.jit
def _tell(told, told_ready, items, first, last, expert, tile_n):
    """Leave a tile to the consumers, or a first row of -1 after the last one."""
    field = gl.arange(0, 8, layout=gl.BlockedLayout([8], [32], [4], [0]))  # all of [8] in every thread
    fields = gl.where(field == 2, expert, tile_n)
    fields = gl.where(field == 1, last, fields)
    told.index(items % TOLD).store(gl.where(field == 0, first, fields))
    barrier()
    mbarrier.arrive(told_ready.index(items % TOLD))


@gluon.jit
def _field(fields, index: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, layout=fields.type.layout) == index, fields, 0), 0)


@gluon.jit
def _told(told, told_ready, items):
    """What `_tell` left: (first, last, expert, tile_n)."""
    mbarrier.wait(told_ready.index(items % TOLD), (items // TOLD) & 1)
    fields = told.index(items % TOLD).load(gl.BlockedLayout([8], [32], [4], [0]))
    return _field(fields, 0), _field(fields, 1), _field(fields, 2), _field(fields, 3)


@gluon.jit
def _producer(x, few_of_x, weight, tiles_ptr, counts_ptr, smem, barriers, tiles_n, steps, size, height, inner,
              FEW: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr, HALVES: gl.constexpr,
              TRANSPOSED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    x_smem, w_smem, told = smem
    ready, empty, told_ready = barriers
    rows: gl.constexpr = x_smem.shape[1]
    block_k: gl.constexpr = x_smem.shape[2]
    block_n: gl.constexpr = w_smem.shape[1] * w_smem.shape[2] // block_k
    half: gl.constexpr = block_n // 2
    row_bytes: gl.constexpr = block_k * x_smem.dtype.primitive_bitwidth // 8
    ticket_ptr = counts_ptr + (1 if FIRST else 2)
    if PDL:
        wait_for_kernels(steps)
    work_items = gl.load(counts_ptr) * tiles_n
    n = 0
    items = 0
    work = gl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while work < work_items:
        tile_at = tiles_ptr + 3 * (work // tiles_n)
        tile_n = work % tiles_n
        expert = gl.load(tile_at)
        first = gl.load(tile_at + 1)
        last = gl.load(tile_at + 2)
        _tell(told, told_ready, items, first, last, expert, tile_n)
        is_whole = first + rows < last
        is_few = first + FEW >= last
        if HALVES:
            column = expert * height + tile_n * half
            other = column + size
        elif TRANSPOSED:
            column = tile_n * block_n
            other = expert * inner
        else:
            column = expert * height + tile_n * block_n
            other = column + half
        for step in range(0, steps):
            stage = n % STAGES
            k = step * block_k
            mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
            if is_whole:
                mbarrier.expect(ready.index(stage), (CONSUMERS * rows + block_n) * row_bytes)
                tma.async_copy_global_to_shared(x, [first + rows, k], ready.index(stage), x_smem.index(STAGES + stage))
            elif is_few:
                mbarrier.expect(ready.index(stage), (FEW + block_n) * row_bytes)
            else:
                mbarrier.expect(ready.index(stage), (rows + block_n) * row_bytes)
            if is_few:
                few = x_smem.index(stage).slice(0, FEW)
                tma.async_copy_global_to_shared(few_of_x, [first, k], ready.index(stage), few)
            else:
                tma.async_copy_global_to_shared(x, [first, k], ready.index(stage), x_smem.index(stage))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(weight, [other + k, column], ready.index(stage), w_smem.index(stage))
            else:
                tma.async_copy_global_to_shared(
                    weight, [column, k], ready.index(stage), w_smem.index(stage).slice(0, half)
                )
                tma.async_copy_global_to_shared(
                    weight, [other, k], ready.index(stage), w_smem.index(stage).slice(half, half)
                )
            n += 1
        items += 1
        work = gl.atomic_add(ticket_ptr, 1, sem="relaxed")
    _tell(told, told_ready, items, -1, 0, 0, 0)


@gluon.jit
def _activated(x, ACTIVATION: gl.constexpr, ALPHA: gl.constexpr):
    if ACTIVATION == "silu":
        return x * sigmoid(x, ALPHA)
    else:
        return activate(x, ACTIVATION, ALPHA)


@gluon.jit
def _halves(product):
    """[M, 2 N] -> its left half and its right one, [M, N] each."""
    return product.reshape([product.shape[0], 2, product.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _scaled(acc, scales, begin, last, first_column, height, columns):
    """Sums of e4m3 times the scales of their rows, from `begin` on, and of the weight's rows, which are an expert's first one's."""
    x_scale_ptr, scale_ptr = scales
    row = begin + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    column = first_column + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    x_scale = gl.load(x_scale_ptr + row, mask=row < last, other=0.0)
    scale = gl.load(scale_ptr + height + column, mask=column < columns, other=0.0)
    return acc * x_scale[:, None] * scale[None, :]


@gluon.jit
def _store(out_ptr, order_ptr, value, begin, last, first_column, size, BY_PAIR: gl.constexpr):
    """Rows from `begin` on that are below `last`: exchanged first, so that a row's neighbours leave together."""
    columns: gl.constexpr = value.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])
    value = gl.convert_layout(value, layout)
    row = begin + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, columns, layout=gl.SliceLayout(0, layout))
    live = row < last
    if BY_PAIR:
        row = gl.load(order_ptr + row, mask=live, other=0)
    inside = live[:, None] & (column < size)[None, :]
    gl.store(out_ptr + row.to(gl.int64)[:, None] * size + column[None, :], value, mask=inside)


@gluon.jit
def _consumer(out_ptr, bias_ptr, order_ptr, scales, smem, barriers, steps, size, height, ONE: gl.constexpr,
              STAGES: gl.constexpr, FIRST: gl.constexpr, GATED: gl.constexpr, HALVES: gl.constexpr,
              TRANSPOSED: gl.constexpr, SCALED: gl.constexpr, ACTIVATION: gl.constexpr, ALPHA: gl.constexpr,
              LIMIT: gl.constexpr, SHIFT: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    x_smem, w_smem, told = smem
    ready, empty, told_ready = barriers
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    rows: gl.constexpr = x_smem.shape[1]
    block_n: gl.constexpr = w_smem.shape[1] * w_smem.shape[2] // x_smem.shape[2]
    half: gl.constexpr = block_n // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, block_n, 256 // x_smem.dtype.primitive_bitwidth]
    )
    columns = 2 * size if GATED else size
    if PDL:
        wait_for_kernels(steps)
    n = 0
    items = 0
    first, last, expert, tile_n = _told(told, told_ready, items)
    while first >= 0:
        begin = first + ONE * rows
        if begin < last:
            acc = gl.full([rows, block_n], 0.0, gl.float32, layout)
            acc, n = multiply(acc, n, steps, smem, (ready, empty), ONE, STAGES, TRANSPOSED)
            if SCALED:
                acc = _scaled(acc, scales, begin, last, tile_n * block_n, expert * height, columns)
            if HAS_BIAS:
                column = gl.arange(0, block_n, layout=gl.SliceLayout(0, layout))
                if HALVES:
                    inside = tile_n * half + column % half < size
                    column = tile_n * half + column % half + column // half * size
                else:
                    column += tile_n * block_n
                    inside = column < columns
                bias_at = bias_ptr + expert.to(gl.int64) * columns
                bias = gl.load(bias_at + column, mask=inside, other=0.0)
                acc += bias.to(gl.float32)[None, :]
            if GATED:
                acc = rounded(acc, dtype)
                if HALVES:
                    gate, up = _halves(acc)
                elif SCALED:
                    gate, up = acc.reshape([rows, block_n // 16, 2, 8]).permute((0, 1, 3, 2)).split()
                else:
                    gate, up = acc.reshape([rows, half, 2]).split()
                if LIMIT > 0:
                    gate, up = limited(gate, up, LIMIT)
                value = (_activated(gate, ACTIVATION, ALPHA) * (up + SHIFT)).to(dtype).reshape([rows, half])
                _store(out_ptr, order_ptr, value, begin, last, tile_n * half, size, False)
            else:
                if FIRST:
                    acc = _activated(rounded(acc, dtype), ACTIVATION, ALPHA)
                left, right = _halves(acc)
                _store(out_ptr, order_ptr, left.to(dtype), begin, last, tile_n * block_n, size, not FIRST)
                _store(out_ptr, order_ptr, right.to(dtype), begin, last, tile_n * block_n + half, size, not FIRST)
        else:
            for _ in range(0, steps):  # the producer waits for both
                stage = n % STAGES
                mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
                barrier()  # no warp waits for a turn of the stage before this one
                mbarrier.arrive(empty.index(stage))
                n += 1
        items += 1
        first, last, expert, tile_n = _told(told, told_ready, items)


@gluon.jit(do_not_specialize=["tiles_n", "steps"])
def grouped_gemm_hopper_kernel(
    out_ptr,
    x,
    few_of_x,
    weight,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    counts_ptr,
    tiles_n,
    steps,
    size,  # of the output
    height,  # rows of an expert in the stack
    inner,  # columns of x
    FEW: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    FIRST: gl.constexpr,  # of the two products
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    SCALED: gl.constexpr,  # both operands are e4m3 with a scale a row; gate and up lie in eights
    ACTIVATION: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    SHIFT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = x.dtype
    HALVES: gl.constexpr = GATED and not INTERLEAVED and not SCALED
    shared: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=dtype.primitive_bitwidth, rank=2
    )
    x_smem = gl.allocate_shared_memory(dtype, [CONSUMERS * STAGES, BLOCK_M, BLOCK_K], shared)
    if TRANSPOSED:
        w_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], shared)
    else:
        w_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], shared)
    told = gl.allocate_shared_memory(gl.int32, [TOLD, 8], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told_ready = gl.allocate_shared_memory(gl.int64, [TOLD, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    for place in gl.static_range(TOLD):
        mbarrier.init(told_ready.index(place), count=1)
    fence_async_shared()
    barrier()
    smem = (x_smem, w_smem, told)
    barriers = (ready, empty, told_ready)
    scales = (x_scale_ptr, scale_ptr)
    gl.warp_specialize(
        [
            (_producer, (x, few_of_x, weight, tiles_ptr, counts_ptr, smem, barriers, tiles_n, steps, size, height,
                         inner, FEW, STAGES, FIRST, HALVES, TRANSPOSED, PDL)),
            (_consumer, (out_ptr, bias_ptr, order_ptr, scales, smem, barriers, steps, size, height, 0, STAGES, FIRST,
                         GATED, HALVES, TRANSPOSED, SCALED, ACTIVATION, ALPHA, LIMIT, SHIFT, HAS_BIAS, PDL)),
            (_consumer, (out_ptr, bias_ptr, order_ptr, scales, smem, barriers, steps, size, height, 1, STAGES, FIRST,
                         GATED, HALVES, TRANSPOSED, SCALED, ACTIVATION, ALPHA, LIMIT, SHIFT, HAS_BIAS, PDL)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, up: Tensor, down: Tensor, form: Form) -> bool:
    """Whether both products of `experts` are computed here: 16-bit types, all rows at whole 16 bytes, on Hopper.

    A stack that lies transposed has gate and up in turn: halves of it would be no neighbours in shared memory.
    """
    return (
        multiprocessors(x.device) > 0
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == up.dtype == down.dtype
        and not (form.transposed and form.gated and not form.interleaved)
        and all(count % 8 == 0 for count in (x.shape[1], *up.shape[1:], *down.shape[1:]))
        and all(one.data_ptr() % 16 == 0 for one in (up, down))
    )


def takes_e4m3(x: Tensor, up: QuantStack, up_bias: Tensor | None, down: QuantStack, down_bias: Tensor | None) -> bool:
    """Whether both products of `repacked_experts` are computed here once rows are rounded: e4m3 with one scale a row, on Hopper.

    Not with biases: with them and scales a thread would hold more than it has registers for.
    """
    return (
        multiprocessors(x.device) > 0
        and up_bias is None
        and down_bias is None
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(one.has_e4m3_rows and one.qweight.data_ptr() % 16 == 0 for one in (up, down))
    )


class Scales(NamedTuple):
    """Of e4m3: float32 of each row [T * k] and of each row of the weights [E, height]; rows that an expert has; the result's dtype."""

    rows: Tensor
    weight: Tensor
    columns: int
    dtype: torch.dtype


def grouped_gemm_hopper(
    of: SortedRows,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routes: Routes,
    form: Form,
    first: bool,
    tiles: HopperTiles,
    programs: int,
    scales: Scales | None = None,
) -> Tensor:
    """As `grouped_gemm`, of rows [T * k, K] in the order of experts; with scales both are e4m3, as `takes_e4m3` says."""
    gated = form.gated and first
    height, inner = (weight.shape[2], weight.shape[1]) if form.transposed else weight.shape[1:]
    columns = height if scales is None else scales.columns
    size = columns // 2 if gated else columns
    out = torch.empty(len(rows), size, dtype=rows.dtype if scales is None else scales.dtype, device=rows.device)
    tiles_n, block_k = -(-columns // tiles.block_n), BLOCK_K * 2 // rows.element_size()
    box = (block_k, tiles.block_n) if form.transposed else (tiles.block_n // 2, block_k)
    grouped_gemm_hopper_kernel[(min(programs, len(of.tiles) * tiles_n),)](
        out,
        tiles_of(rows, BLOCK_M, block_k),
        tiles_of(rows, FEW, block_k),
        tiles_of(weight.flatten(0, 1), *box),
        out if scales is None else scales.rows,
        out if scales is None else scales.weight,
        bias if bias is not None else out,
        routes.order,
        of.tiles,
        of.counts,
        tiles_n,
        -(-inner // block_k),
        size,
        height,
        inner,
        FEW=FEW,
        BLOCK_M=BLOCK_M,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        STAGES=tiles.stages,
        FIRST=first,
        **form._replace(gated=gated).constants,
        SCALED=scales is not None,
        HAS_BIAS=bias is not None,
        REGISTERS=REGISTERS,
        num_warps=4,
        **dependent(rows.device),
    )
    return out
