"""Gluon, for Hopper: paged attention of ragged rows, for the sequences of a step that have more than one row.

The grid is persistent: a program takes the next tile until none is left. A tile is BLOCK_Q rows of one sequence and one
KV head; its matrix rows are (token, query head of the group). A program is three warp groups. The producer copies
queries, keys and values to shared memory and runs ahead of the two consumers, into the next tile too; it tells them
where a tile lies. Tiles of keys are visited from the last to the first, because only the last ones need a mask; those
without one are copied by the bulk copy engine (TMA), a block of the cache at a time, the others thread by thread, so
that nothing that an unused slot holds is read. Each consumer multiplies half of a tile's matrix rows: it issues q @ k.T
of a tile of keys together with p @ v of the previous one, and exponentiates while the other's run: they issue in
turn. The producer is `hopper_producer.py`. The technique is FlashAttention-3's (https://arxiv.org/abs/2407.08608).

Computes what `prefill.py` computes, which serves other GPUs, head sizes and types. Knows no metadata but the op's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pagegraph.kernels.attention.hopper_producer import producer
from pagegraph.kernels.attention.hopper_tiles import barrier, key_tiles, told
from pagegraph.kernels.attention.softmax import LOG2E
from pagegraph.kernels.gpu import multiprocessors

_LOG2E = gl.constexpr(LOG2E)

BLOCK_M = 64  # matrix rows of a consumer
STAGES = 2  # tiles of keys, and of values, in shared memory
SEARCHED = 128  # sequences whose tiles are counted at a time


class Tile(NamedTuple):
    """keys: of a tile. registers: of a consumer's thread; the producer keeps what is left of 504 behind two such."""

    keys: int
    registers: int


TILES = {64: Tile(128, 192), 128: Tile(128, 192), 256: Tile(64, 224)}  # by the size of a head


@cache
def _tickets(device: torch.device) -> Tensor:
    """The next tile that a program takes, int32 [1]; 0 between launches, which are one after the other. Made once, as graphs hold its address."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def takes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether `attend_ragged` computes this: 16-bit types, blocks not quantised, of a power of two, heads of TILES, rows at whole 16 bytes."""
    head_size, group = query.shape[2], query.shape[1] // key_cache.shape[2]
    return (
        multiprocessors(query.device) > 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key_cache.dtype
        and head_size in TILES
        and value_cache.shape[3] == head_size
        and group <= 2 * BLOCK_M
        and key_cache.shape[1] in (8, 16, 32, 64, 128, 256)  # rows that the copy engine takes at a time
        and query.stride(0) % 16 == 0
        and query.stride(1) % 16 == 0
    )


@gluon.jit
def _softmax(s, position, start, scale, m_i, l_i, MASK: gl.constexpr, WINDOW: gl.constexpr, CHUNK: gl.constexpr,
             SOFTCAP: gl.constexpr):  # fmt: skip
    """Products s [M, N] with keys from `start` on -> (weights [M, N], new maximum [M] and sum [M], what earlier sums shrink by [M])."""
    factor = scale
    if SOFTCAP > 0:
        factor = 1.0
        power = gl.exp2(s * scale * (2.0 * _LOG2E / SOFTCAP))  # tanh(y) = 1 - 2 / (e^2y + 1)
        s = (1.0 - 2.0 / (power + 1.0)) * (SOFTCAP * _LOG2E)
    if MASK:
        token = start + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        seen = token[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (token[None, :] > position[:, None] - WINDOW)
        if CHUNK > 0:
            seen = seen & (token[None, :] // CHUNK == position[:, None] // CHUNK)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * factor)
    anchor = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen no key yet: no inf - inf
    shrink = gl.exp2(m_i - anchor)
    weights = gl.exp2(s * factor - anchor[:, None])
    return weights, m_new, l_i * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _packed(weights, DTYPE: gl.constexpr):
    """float32 [M, N] -> int32 [M, N / 2] of two neighbours each, in DTYPE: from loop to loop 16-bit elements take a register each."""
    first, second = weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]).split()
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [first, second], gl.int32, True, 1)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [first, second], gl.int32, True, 1)


@gluon.jit
def _unpacked(packed, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """What `_packed` packed, as an operand of the tensor cores."""
    if DTYPE == gl.bfloat16:
        bf16: gl.constexpr = (gl.bfloat16, gl.bfloat16)
        first, second = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], bf16, True, 1)
    else:
        fp16: gl.constexpr = (gl.float16, gl.float16)
        first, second = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], fp16, True, 1)
    p = gl.join(first, second).reshape([packed.shape[0], 2 * packed.shape[1]])
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)


@gluon.jit
def _wait_for_turn(x, HALF: gl.constexpr):
    """Until the other consumer has called `_give_turn`. Of the sixteen named barriers the compiler takes the first few."""
    if HALF == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def _give_turn(x, HALF: gl.constexpr):
    if HALF == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def _next(packed, m_i, l_i, acc, zeros, position, start, n, scale, q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty,
          P: gl.constexpr, HALF: gl.constexpr, MASK: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
          CHUNK: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """Packed weights of the n-th tile of keys; those of the one before are multiplied by its values."""
    stage = n % STAGES
    before = (n - 1) % STAGES
    p = _unpacked(packed, q.dtype, P)
    mbarrier.wait(k_ready.index(stage), (n // STAGES) & 1)
    _wait_for_turn(n, HALF)
    if MASK:
        fence_async_shared()  # tensor cores see what threads copied
    s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), ((n - 1) // STAGES) & 1)
    if MASK:
        fence_async_shared()
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    _give_turn(n, HALF)
    s = warpgroup_mma_wait(1, deps=[s])
    weights, m_i, l_i, shrink = _softmax(s, position, start, scale, m_i, l_i, MASK, WINDOW, CHUNK, SOFTCAP)
    # The assembler moves this wait ahead of the exponentials. Kept behind them, it was slower by a tenth.
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    barrier()  # all warps have read keys and values
    mbarrier.arrive(k_empty.index(stage))
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return _packed(weights, q.dtype), m_i, l_i, acc


@gluon.jit
def _consumer(out_ptr, sinks_ptr, scale, smem, barriers, HALF: gl.constexpr,
              KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
              WINDOW: gl.constexpr, CHUNK: gl.constexpr, SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr):  # fmt: skip
    q_smem, k_smem, v_smem, located = smem
    located_ready, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    dtype: gl.constexpr = q_smem.dtype
    block_m: gl.constexpr = q_smem.shape[1]
    block_n: gl.constexpr = k_smem.shape[1]
    size: gl.constexpr = k_smem.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, size, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // size, size // 8], [4, 1], [1, 0])
    bounded: gl.constexpr = (WINDOW > 0) | (CHUNK > 0)  # every tile of keys may want a mask
    q = q_smem.index(HALF)
    lane = HALF * block_m + gl.arange(0, block_m, layout=gl.SliceLayout(1, layout))
    zeros = gl.full([block_m, block_n], 0.0, gl.float32, layout)
    n = 0  # tiles of keys so far
    items = 0
    if HALF == 1:
        _give_turn(items, HALF)  # the other begins
    row_begin, count, first, offset, kv_head = told(located, located_ready, items)
    while kv_head >= 0:
        begin, end = key_tiles(first, count, offset, BLOCK_Q, block_n, WINDOW, CHUNK)
        position = offset + first + lane // GROUP
        m_i = gl.full([block_m], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        l_i = gl.full([block_m], 0.0, gl.float32, gl.SliceLayout(1, layout))
        if HAS_SINKS:
            sink = gl.load(sinks_ptr + kv_head * GROUP + lane % GROUP, mask=lane < BLOCK_Q * GROUP, other=0.0)
            m_i = sink.to(gl.float32) * _LOG2E
            l_i += 1.0
        acc = gl.full([block_m, size], 0.0, gl.float32, acc_layout)
        stage = n % STAGES
        mbarrier.wait(q_ready, items & 1)
        mbarrier.wait(k_ready.index(stage), (n // STAGES) & 1)
        fence_async_shared()
        s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        barrier()
        mbarrier.arrive(k_empty.index(stage))
        weights, m_i, l_i, shrink = _softmax(
            s, position, (end - 1) * block_n, scale, m_i, l_i, True, WINDOW, CHUNK, SOFTCAP
        )
        p = _packed(weights, dtype)
        n += 1
        whole = begin  # tiles below it are seen whole by every row
        if not bounded:
            whole = gl.minimum((offset + first + 1) // block_n, end - 1)
        for back in range(1, end - whole):
            p, m_i, l_i, acc = _next(
                p, m_i, l_i, acc, zeros, position, (end - 1 - back) * block_n, n, scale, q, k_smem, v_smem,
                k_ready, k_empty, v_ready, v_empty, p_layout, HALF, True, STAGES, WINDOW, CHUNK, SOFTCAP,
            )  # fmt: skip
            n += 1
        if not bounded:
            for _ in range(0, whole):
                p, m_i, l_i, acc = _next(
                    p, m_i, l_i, acc, zeros, position, 0, n, scale, q, k_smem, v_smem,
                    k_ready, k_empty, v_ready, v_empty, p_layout, HALF, False, STAGES, WINDOW, CHUNK, SOFTCAP,
                )  # fmt: skip
                n += 1
        mbarrier.arrive(q_empty)
        items += 1
        stage = (n - 1) % STAGES
        mbarrier.wait(v_ready.index(stage), ((n - 1) // STAGES) & 1)
        fence_async_shared()
        acc = warpgroup_mma(_unpacked(p, dtype, p_layout), v_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(v_empty.index(stage))
        out = (acc / gl.convert_layout(l_i, gl.SliceLayout(1, acc_layout))[:, None]).to(dtype)
        out = gl.convert_layout(out, out_layout)
        out_lane = HALF * block_m + gl.arange(0, block_m, layout=gl.SliceLayout(1, out_layout))
        column = gl.arange(0, size, layout=gl.SliceLayout(0, out_layout))
        row = out_lane // GROUP
        live = (out_lane < BLOCK_Q * GROUP) & (row < count - first)
        tile_ptr = out_ptr + ((row_begin + first).to(gl.int64) * KV_HEADS + kv_head) * (GROUP * size)
        at = row * (KV_HEADS * GROUP * size) + out_lane % GROUP * size
        gl.store(tile_ptr + at[:, None] + column[None, :], out, mask=live[:, None])
        row_begin, count, first, offset, kv_head = told(located, located_ready, items)
    if HALF == 0:
        _wait_for_turn(items, HALF)  # the last that was given


@gluon.jit(do_not_specialize=["num_seqs"])
def prefill_hopper_kernel(
    out_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_blocks,
    value_blocks,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    sinks_ptr,
    tickets_ptr,
    scale,
    num_seqs,
    query_token_stride,
    query_head_stride,
    table_stride,
    BLOCK_SIZE: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
    CHUNK: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    WIDE: gl.constexpr,
    SEARCHED: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HEAD_SIZE], shared)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_SIZE], shared)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_SIZE], shared)
    located = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    located_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Each of the producer's 128 threads arrives when its copies have; of a consumer one thread arrives.
    for place in gl.static_range(2):
        mbarrier.init(located_ready.index(place), count=1)
    mbarrier.init(q_ready, count=128)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=128)
        mbarrier.init(v_ready.index(stage), count=128)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barrier()
    smem = (q_smem, k_smem, v_smem, located)
    barriers = (located_ready, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    gl.warp_specialize(
        [
            (producer, (query_ptr, key_cache_ptr, value_cache_ptr, key_blocks, value_blocks, block_tables_ptr, query_start_ptr, seq_lens_ptr,
                         tickets_ptr, num_seqs, query_token_stride, query_head_stride, table_stride, smem, barriers,
                         BLOCK_SIZE, KV_HEADS, GROUP, BLOCK_Q, STAGES, WINDOW, CHUNK, WIDE, SEARCHED)),
            (_consumer, (out_ptr, sinks_ptr, scale, smem, barriers, 0,
                         KV_HEADS, GROUP, BLOCK_Q, STAGES, WINDOW, CHUNK, SOFTCAP, HAS_SINKS)),
            (_consumer, (out_ptr, sinks_ptr, scale, smem, barriers, 1,
                         KV_HEADS, GROUP, BLOCK_Q, STAGES, WINDOW, CHUNK, SOFTCAP, HAS_SINKS)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


def _blocks(cache: Tensor, keys: int) -> TensorDescriptor:
    """Blocks [blocks, block_size, Hkv, D] as the copy engine takes them: all rows of one head of a block at a time, or those of a tile."""
    blocks, block_size, heads, size = cache.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(
        cache.view(blocks * block_size, heads * size), [min(block_size, keys), size], layout
    )


def attend_ragged(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> None:
    """Write the rows of out [T, Hq, D] that belong to sequences with two rows or more; see `takes`."""
    tokens, heads, head_size = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    group, tile = heads // kv_heads, TILES[head_size]
    block_q = 2 * BLOCK_M // group
    num_seqs = block_tables.shape[0]
    most = (tokens // block_q + min(num_seqs, tokens // 2)) * kv_heads  # items that a step of these sizes may have
    prefill_hopper_kernel[(max(1, min(multiprocessors(query.device), most)),)](
        out,
        query,
        key_cache,
        value_cache,
        _blocks(key_cache, tile.keys),
        _blocks(value_cache, tile.keys),
        block_tables,
        query_start,
        seq_lens,
        sinks if sinks is not None else query,
        _tickets(query.device),
        scale if softcap else scale * LOG2E,
        num_seqs,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_SIZE=head_size,
        BLOCK_M=BLOCK_M,
        BLOCK_Q=block_q,
        BLOCK_N=tile.keys,
        STAGES=STAGES,
        WINDOW=window,
        CHUNK=chunk,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        WIDE=max(key_cache.numel(), value_cache.numel()) >= 2**31,
        SEARCHED=SEARCHED,
        REGISTERS=tile.registers,
        num_warps=4,
    )
