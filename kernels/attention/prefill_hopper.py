"""Gluon, for Hopper: paged attention of ragged rows, for the sequences of a step that have more than one row.

The grid is persistent: a program takes the next tile until none is left. A tile is BLOCK_Q rows of one sequence and one
KV head; its matrix rows are (token, query head of the group). A program is three warp groups. The producer copies
queries, keys and values to shared memory, block by block of the cache, and runs ahead of the two consumers, into the
next tile too; it tells them where a tile lies. Each consumer multiplies half of a tile's matrix rows: it issues q @ k.T of a tile of keys together with
p @ v of the previous one, and exponentiates while they run. Tiles of keys are visited from the last to the first,
because only the last ones need a mask. The technique is FlashAttention-3's (https://arxiv.org/abs/2407.08608).

Computes what `prefill.py` computes, which serves other GPUs, head sizes and types. Knows no metadata but the op's.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pagegraph.kernels.attention.softmax import LOG2E

_LOG2E = gl.constexpr(LOG2E)
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # of a warp group; Triton 3.7 renamed it

HEAD_SIZES = (64, 128)
BLOCK_M = 64  # matrix rows of a consumer
BLOCK_N = 128  # keys of a tile
STAGES = 2  # tiles of keys, and of values, in shared memory
SEARCHED = 128  # sequences whose tiles are counted at a time
CONSUMER_REGISTERS = 192  # a thread; the producer keeps 120


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time; 0 on a device that the kernel is not for."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _tickets(device: torch.device) -> Tensor:
    """The next tile that a program takes, int32 [1]; 0 between launches, which are one after the other. Made once, as graphs hold its address."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def takes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether `attend_ragged` computes this: 16-bit types, blocks not quantised, heads of HEAD_SIZES, rows at whole 16 bytes."""
    head_size, group = query.shape[2], query.shape[1] // key_cache.shape[2]
    return (
        multiprocessors(query.device) > 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key_cache.dtype
        and head_size in HEAD_SIZES
        and value_cache.shape[3] == head_size
        and group <= 2 * BLOCK_M
        and query.stride(0) % 16 == 0
        and query.stride(1) % 16 == 0
    )


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tiles_of(base, query_start_ptr, num_seqs, BLOCK_Q: gl.constexpr, SEARCHED: gl.constexpr):
    """int32 [SEARCHED]: how many tiles sequences from `base` on have; those of one row are the decode kernel's and have none."""
    index = base + gl.arange(0, SEARCHED, layout=gl.BlockedLayout([1], [32], [4], [0]))
    begin = gl.load(query_start_ptr + index, mask=index < num_seqs, other=0)
    count = gl.load(query_start_ptr + index + 1, mask=index < num_seqs, other=0) - begin
    return gl.where(count > 1, (count + BLOCK_Q - 1) // BLOCK_Q, 0)


@gluon.jit
def _num_tiles(query_start_ptr, num_seqs, BLOCK_Q: gl.constexpr, SEARCHED: gl.constexpr):
    """Tiles of a step, for each KV head."""
    tiles = 0
    for base in range(0, num_seqs, SEARCHED):
        tiles += gl.sum(_tiles_of(base, query_start_ptr, num_seqs, BLOCK_Q, SEARCHED), 0)
    return tiles


@gluon.jit
def _passed(ends, tile, SEARCHED: gl.constexpr):
    """(how many sequences end at or before a tile, tiles of those): `ends` rise, as do indices, so one maximum finds both."""
    index = 1 + gl.arange(0, SEARCHED, layout=ends.type.layout)
    both = gl.max(gl.where(ends <= tile, ends.to(gl.int64) << 32 | index, 0), 0)
    return (both & 0x7FFFFFFF).to(gl.int32), (both >> 32).to(gl.int32)


@gluon.jit
def _locate(tile, ends, query_start_ptr, seq_lens_ptr, num_seqs, BLOCK_Q: gl.constexpr, SEARCHED: gl.constexpr):
    """(sequence of a tile, its first row of the step, its rows, the tile's first of them, tokens ahead of the step's).

    ends: tiles up to the end of each of the first SEARCHED sequences; of more sequences they are counted here.
    """
    sequence, before = _passed(ends, tile, SEARCHED)
    for base in range(SEARCHED, num_seqs, SEARCHED):
        if sequence == base:
            more = before + gl.associative_scan(_tiles_of(base, query_start_ptr, num_seqs, BLOCK_Q, SEARCHED), 0, _add)
            passed, end = _passed(more, tile, SEARCHED)
            sequence += passed
            before = gl.maximum(before, end)
    row_begin = gl.load(query_start_ptr + sequence)
    count = gl.load(query_start_ptr + sequence + 1) - row_begin
    offset = gl.load(seq_lens_ptr + sequence) - count
    return sequence, row_begin, count, (tile - before) * BLOCK_Q, offset


@gluon.jit
def _field(fields, index: gl.constexpr):
    """One of [8] values that every thread holds."""
    return gl.sum(gl.where(gl.arange(0, 8, layout=fields.type.layout) == index, fields, 0), 0)


@gluon.jit
def _key_tiles(first, count, offset, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr,
               CHUNK: gl.constexpr):  # fmt: skip
    """(begin, end) of the tiles of keys that some row of a tile sees."""
    begin = 0
    if WINDOW > 0:
        begin = gl.maximum(offset + first - WINDOW + 1, 0)
    if CHUNK > 0:
        begin = gl.maximum((offset + first) // CHUNK * CHUNK, begin)
    end = offset + gl.minimum(first + BLOCK_Q, count)
    return begin // BLOCK_N, (end + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def _tell(located, located_ready, items, row_begin, count, first, offset, kv_head):
    """Leave where a tile lies to the consumers, or a KV head of -1 after the last one.

    Its place of two is free: they were through with the tile before last when they freed its queries.
    """
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])  # all of [8] in every thread
    field = gl.arange(0, 8, layout=layout)
    fields = gl.where(field == 3, offset, kv_head)
    fields = gl.where(field == 2, first, fields)
    fields = gl.where(field == 1, count, fields)
    located.index(items % 2).store(gl.where(field == 0, row_begin, fields))
    _barrier()
    mbarrier.arrive(located_ready.index(items % 2))


@gluon.jit
def _told(located, located_ready, items):
    """What `_tell` left: (row_begin, count, first, offset, kv_head)."""
    mbarrier.wait(located_ready.index(items % 2), (items // 2) & 1)
    fields = located.index(items % 2).load(gl.BlockedLayout([8], [32], [4], [0]))
    return _field(fields, 0), _field(fields, 1), _field(fields, 2), _field(fields, 3), _field(fields, 4)


@gluon.jit
def _copy_rows(
    cache_ptr, table_ptr, start, last, smem, BLOCK_SIZE: gl.constexpr, STRIDE: gl.constexpr, WIDE: gl.constexpr
):
    """One head's keys or values from token `start` on; `last` stands for those beyond it.

    So a weight of 0 meets no value that an unused slot holds.
    """
    rows: gl.constexpr = smem.shape[0]
    size: gl.constexpr = smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // size, size // 8], [4, 1], [1, 0])
    token = gl.minimum(start + gl.arange(0, rows, layout=gl.SliceLayout(1, layout)), last)
    column = gl.arange(0, size, layout=gl.SliceLayout(0, layout))
    block = gl.load(table_ptr + token // BLOCK_SIZE)
    if WIDE:
        block = block.to(gl.int64)
    slot = block * BLOCK_SIZE + token % BLOCK_SIZE
    async_copy.async_copy_global_to_shared(smem, cache_ptr + (slot * STRIDE)[:, None] + column[None, :])


@gluon.jit
def _producer(query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, query_start_ptr, seq_lens_ptr, tickets_ptr, num_seqs,
              query_token_stride, query_head_stride, table_stride, smem, barriers,
              BLOCK_SIZE: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr,
              STAGES: gl.constexpr, WINDOW: gl.constexpr, CHUNK: gl.constexpr, WIDE: gl.constexpr,
              SEARCHED: gl.constexpr):  # fmt: skip
    q_smem, k_smem, v_smem, located = smem
    located_ready, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    block_m: gl.constexpr = q_smem.shape[1]
    block_n: gl.constexpr = k_smem.shape[1]
    size: gl.constexpr = k_smem.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // size, size // 8], [4, 1], [1, 0])
    tiles = _num_tiles(query_start_ptr, num_seqs, BLOCK_Q, SEARCHED)
    ends = gl.associative_scan(_tiles_of(0, query_start_ptr, num_seqs, BLOCK_Q, SEARCHED), 0, _add)
    copied = 0  # tiles of keys
    items = 0
    ticket = gl.atomic_add(tickets_ptr, 1, sem="relaxed")
    while ticket < tiles * KV_HEADS:
        # Late tiles see the most keys and come first, all heads of one together.
        tile = tiles - 1 - ticket // KV_HEADS
        kv_head = ticket % KV_HEADS
        sequence, row_begin, count, first, offset = _locate(
            tile, ends, query_start_ptr, seq_lens_ptr, num_seqs, BLOCK_Q, SEARCHED
        )
        _tell(located, located_ready, items, row_begin, count, first, offset, kv_head)
        begin, end = _key_tiles(first, count, offset, BLOCK_Q, block_n, WINDOW, CHUNK)
        last = offset + gl.minimum(first + BLOCK_Q, count) - 1
        table_ptr = block_tables_ptr + sequence.to(gl.int64) * table_stride
        key_ptr = key_cache_ptr + kv_head * size
        value_ptr = value_cache_ptr + kv_head * size
        for back in range(0, end - begin):
            start = (end - 1 - back) * block_n
            stage = copied % STAGES
            phase = (copied // STAGES) & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            _copy_rows(key_ptr, table_ptr, start, last, k_smem.index(stage), BLOCK_SIZE, KV_HEADS * size, WIDE)
            async_copy.mbarrier_arrive(k_ready.index(stage), increment_count=False)
            if back == 0:
                mbarrier.wait(q_empty, (items & 1) ^ 1)
                tile_ptr = query_ptr + (row_begin + first).to(gl.int64) * query_token_stride
                tile_ptr += kv_head * GROUP * query_head_stride
                for half in range(2):
                    lane = half * block_m + gl.arange(0, block_m, layout=gl.SliceLayout(1, layout))
                    column = gl.arange(0, size, layout=gl.SliceLayout(0, layout))
                    row = gl.minimum(lane // GROUP, count - 1 - first)
                    at = row * query_token_stride + lane % GROUP * query_head_stride
                    async_copy.async_copy_global_to_shared(q_smem.index(half), tile_ptr + at[:, None] + column[None, :])
                async_copy.mbarrier_arrive(q_ready, increment_count=False)
                items += 1
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            _copy_rows(value_ptr, table_ptr, start, last, v_smem.index(stage), BLOCK_SIZE, KV_HEADS * size, WIDE)
            async_copy.mbarrier_arrive(v_ready.index(stage), increment_count=False)
            copied += 1
        ticket = gl.atomic_add(tickets_ptr, 1, sem="relaxed")
    if ticket == tiles * KV_HEADS + gl.num_programs(0) - 1:  # each program takes one that there is no tile for
        gl.store(tickets_ptr, 0)
    _tell(located, located_ready, items, 0, 0, 0, 0, -1)


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
def _next(p, m_i, l_i, acc, zeros, position, start, n, scale, q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty,
          MASK: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, CHUNK: gl.constexpr,
          SOFTCAP: gl.constexpr):  # fmt: skip
    """Weights of the n-th tile of keys, while those of the one before, p, are multiplied by its values."""
    stage = n % STAGES
    before = (n - 1) % STAGES
    mbarrier.wait(k_ready.index(stage), (n // STAGES) & 1)
    fence_async_shared()  # tensor cores see what was copied
    s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), ((n - 1) // STAGES) & 1)
    fence_async_shared()
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    _barrier()  # all warps have read the keys
    mbarrier.arrive(k_empty.index(stage))
    weights, m_i, l_i, shrink = _softmax(s, position, start, scale, m_i, l_i, MASK, WINDOW, CHUNK, SOFTCAP)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    _barrier()
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    return p, m_i, l_i, acc


@gluon.jit
def _consumer(out_ptr, sinks_ptr, scale, half, smem, barriers,
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
    q = q_smem.index(half)
    lane = half * block_m + gl.arange(0, block_m, layout=gl.SliceLayout(1, layout))
    zeros = gl.full([block_m, block_n], 0.0, gl.float32, layout)
    n = 0  # tiles of keys so far
    items = 0
    row_begin, count, first, offset, kv_head = _told(located, located_ready, items)
    while kv_head >= 0:
        begin, end = _key_tiles(first, count, offset, BLOCK_Q, block_n, WINDOW, CHUNK)
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
        _barrier()
        mbarrier.arrive(k_empty.index(stage))
        weights, m_i, l_i, shrink = _softmax(
            s, position, (end - 1) * block_n, scale, m_i, l_i, True, WINDOW, CHUNK, SOFTCAP
        )
        p = gl.convert_layout(weights.to(dtype), p_layout)
        n += 1
        whole = begin  # tiles below it are seen whole by every row
        if not bounded:
            whole = gl.minimum((offset + first + 1) // block_n, end - 1)
        for back in range(1, end - whole):
            p, m_i, l_i, acc = _next(
                p, m_i, l_i, acc, zeros, position, (end - 1 - back) * block_n, n, scale, q, k_smem, v_smem,
                k_ready, k_empty, v_ready, v_empty, True, STAGES, WINDOW, CHUNK, SOFTCAP,
            )  # fmt: skip
            n += 1
        if not bounded:
            for _ in range(0, whole):
                p, m_i, l_i, acc = _next(
                    p, m_i, l_i, acc, zeros, position, 0, n, scale, q, k_smem, v_smem,
                    k_ready, k_empty, v_ready, v_empty, False, STAGES, WINDOW, CHUNK, SOFTCAP,
                )  # fmt: skip
                n += 1
        mbarrier.arrive(q_empty)
        items += 1
        stage = (n - 1) % STAGES
        mbarrier.wait(v_ready.index(stage), ((n - 1) // STAGES) & 1)
        fence_async_shared()
        acc = warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _barrier()
        mbarrier.arrive(v_empty.index(stage))
        out = (acc / gl.convert_layout(l_i, gl.SliceLayout(1, acc_layout))[:, None]).to(dtype)
        out = gl.convert_layout(out, out_layout)
        out_lane = half * block_m + gl.arange(0, block_m, layout=gl.SliceLayout(1, out_layout))
        column = gl.arange(0, size, layout=gl.SliceLayout(0, out_layout))
        row = out_lane // GROUP
        live = (out_lane < BLOCK_Q * GROUP) & (row < count - first)
        tile_ptr = out_ptr + ((row_begin + first).to(gl.int64) * KV_HEADS + kv_head) * (GROUP * size)
        at = row * (KV_HEADS * GROUP * size) + out_lane % GROUP * size
        gl.store(tile_ptr + at[:, None] + column[None, :], out, mask=live[:, None])
        row_begin, count, first, offset, kv_head = _told(located, located_ready, items)


@gluon.jit
def prefill_hopper_kernel(
    out_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
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
    _barrier()
    smem = (q_smem, k_smem, v_smem, located)
    barriers = (located_ready, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    gl.warp_specialize(
        [
            (_producer, (query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, query_start_ptr, seq_lens_ptr, tickets_ptr, num_seqs,
                         query_token_stride, query_head_stride, table_stride, smem, barriers,
                         BLOCK_SIZE, KV_HEADS, GROUP, BLOCK_Q, STAGES, WINDOW, CHUNK, WIDE, SEARCHED)),
            (_consumer, (out_ptr, sinks_ptr, scale, 0, smem, barriers,
                         KV_HEADS, GROUP, BLOCK_Q, STAGES, WINDOW, CHUNK, SOFTCAP, HAS_SINKS)),
            (_consumer, (out_ptr, sinks_ptr, scale, 1, smem, barriers,
                         KV_HEADS, GROUP, BLOCK_Q, STAGES, WINDOW, CHUNK, SOFTCAP, HAS_SINKS)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


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
    group = heads // kv_heads
    block_q = 2 * BLOCK_M // group
    num_seqs = block_tables.shape[0]
    most = (tokens // block_q + min(num_seqs, tokens // 2)) * kv_heads  # items that a step of these sizes may have
    prefill_hopper_kernel[(max(1, min(multiprocessors(query.device), most)),)](
        out,
        query,
        key_cache,
        value_cache,
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
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        WINDOW=window,
        CHUNK=chunk,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        WIDE=max(key_cache.numel(), value_cache.numel()) >= 2**31,
        SEARCHED=SEARCHED,
        REGISTERS=CONSUMER_REGISTERS,
        num_warps=4,
    )
