"""Gluon: the warp group of `prefill_hopper` that takes tiles and copies queries, keys and values to shared memory.

Whole tiles of keys are copied by the bulk copy engine (TMA), a block of the cache at a time; those that an unused slot
may lie in thread by thread. Knows no arithmetic of attention.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from pagegraph.kernels.attention.hopper_tiles import key_tiles, locate, num_tiles, tell, tile_ends


@gluon.jit
def _unforeseen(zero):
    """Zero again, which the compiler does not know: what is computed with it stays in the loop, instead of in registers throughout."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [zero], gl.int32, False, 1)


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
    token = gl.minimum(start + _unforeseen(0) + gl.arange(0, rows, layout=gl.SliceLayout(1, layout)), last)
    column = gl.arange(0, size, layout=gl.SliceLayout(0, layout))
    block = gl.load(table_ptr + token // BLOCK_SIZE)
    if WIDE:
        block = block.to(gl.int64)
    slot = block * BLOCK_SIZE + token % BLOCK_SIZE
    async_copy.async_copy_global_to_shared(smem, cache_ptr + (slot * STRIDE)[:, None] + column[None, :])


@gluon.jit
def _copy_blocks(blocks, table_ptr, start, column, smem, empty, ready, phase, BLOCK_SIZE: gl.constexpr):
    """One head's keys or values from token `start` on, as many as `smem` has rows, by the copy engine once it is empty."""
    box: gl.constexpr = blocks.block_type.shape[0]
    count: gl.constexpr = smem.shape[0] // box
    rows = ()
    for index in gl.static_range(count):
        token = start + index * box
        rows = rows + (gl.load(table_ptr + token // BLOCK_SIZE) * BLOCK_SIZE + token % BLOCK_SIZE,)
    mbarrier.wait(empty, phase ^ 1)
    mbarrier.expect(ready, smem.shape[0] * smem.shape[1] * 2)
    mbarrier.arrive(ready, count=127)  # for the threads that would copy rows
    for index in gl.static_range(count):
        tma.async_copy_global_to_shared(blocks, [rows[index], column], ready, smem.slice(index * box, box))


@gluon.jit
def producer(query_ptr, key_cache_ptr, value_cache_ptr, key_blocks, value_blocks, block_tables_ptr, query_start_ptr, seq_lens_ptr, tickets_ptr, num_seqs,
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
    all_items = num_tiles(query_start_ptr, num_seqs, BLOCK_Q, SEARCHED) * KV_HEADS
    ends = tile_ends(0, query_start_ptr, num_seqs, BLOCK_Q, SEARCHED)
    copied = 0  # tiles of keys
    items = 0
    ticket = gl.atomic_add(tickets_ptr, 1, sem="relaxed")
    while ticket < all_items:
        # Late tiles see the most keys and come first.
        sequence, row_begin, count, first, offset, kv_head = locate(
            all_items - 1 - ticket, ends, query_start_ptr, seq_lens_ptr, num_seqs, KV_HEADS, BLOCK_Q, SEARCHED
        )
        tell(located, located_ready, items, row_begin, count, first, offset, kv_head)
        begin, end = key_tiles(first, count, offset, BLOCK_Q, block_n, WINDOW, CHUNK)
        last = offset + gl.minimum(first + BLOCK_Q, count) - 1
        table_ptr = block_tables_ptr + sequence.to(gl.int64) * table_stride
        key_ptr = key_cache_ptr + kv_head * size
        value_ptr = value_cache_ptr + kv_head * size
        for back in range(0, end - begin):
            start = (end - 1 - back) * block_n
            stage = copied % STAGES
            phase = (copied // STAGES) & 1
            seen_whole = start + block_n - 1 <= last
            if seen_whole:
                _copy_blocks(
                    key_blocks, table_ptr, start, kv_head * size, k_smem.index(stage), k_empty.index(stage),
                    k_ready.index(stage), phase, BLOCK_SIZE,
                )  # fmt: skip
            else:
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                _copy_rows(key_ptr, table_ptr, start, last, k_smem.index(stage), BLOCK_SIZE, KV_HEADS * size, WIDE)
                async_copy.mbarrier_arrive(k_ready.index(stage), increment_count=False)
            if back == 0:
                mbarrier.wait(q_empty, (items & 1) ^ 1)
                tile_ptr = query_ptr + (row_begin + first).to(gl.int64) * query_token_stride
                tile_ptr += kv_head * GROUP * query_head_stride
                for half in range(2):
                    lane = half * block_m + _unforeseen(0) + gl.arange(0, block_m, layout=gl.SliceLayout(1, layout))
                    column = gl.arange(0, size, layout=gl.SliceLayout(0, layout))
                    row = gl.minimum(lane // GROUP, count - 1 - first)
                    at = row * query_token_stride + lane % GROUP * query_head_stride
                    async_copy.async_copy_global_to_shared(q_smem.index(half), tile_ptr + at[:, None] + column[None, :])
                async_copy.mbarrier_arrive(q_ready, increment_count=False)
                items += 1
            if seen_whole:
                _copy_blocks(
                    value_blocks, table_ptr, start, kv_head * size, v_smem.index(stage), v_empty.index(stage),
                    v_ready.index(stage), phase, BLOCK_SIZE,
                )  # fmt: skip
            else:
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                _copy_rows(value_ptr, table_ptr, start, last, v_smem.index(stage), BLOCK_SIZE, KV_HEADS * size, WIDE)
                async_copy.mbarrier_arrive(v_ready.index(stage), increment_count=False)
            copied += 1
        ticket = gl.atomic_add(tickets_ptr, 1, sem="relaxed")
    if ticket == all_items + gl.num_programs(0) - 1:  # each program takes one that there is no tile for
        gl.store(tickets_ptr, 0)
    tell(located, located_ready, items, 0, 0, 0, 0, -1)
