"""Gluon: which tile of a step a program of `prefill_hopper` computes next, and how its warp groups agree on it.

A tile is BLOCK_Q rows of one sequence; sequences of one row have none. Knows metadata and barriers, no keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # of a warp group; Triton 3.7 renamed it
LONG = gl.constexpr(16384)  # tokens ahead of the step's: keys and values of all heads are more than the L2 cache holds


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
def num_tiles(query_start_ptr, num_seqs, BLOCK_Q: gl.constexpr, SEARCHED: gl.constexpr):
    """Tiles of a step, for each KV head."""
    tiles = 0
    for base in range(0, num_seqs, SEARCHED):
        tiles += gl.sum(_tiles_of(base, query_start_ptr, num_seqs, BLOCK_Q, SEARCHED), 0)
    return tiles


@gluon.jit
def tile_ends(base, query_start_ptr, num_seqs, BLOCK_Q: gl.constexpr, SEARCHED: gl.constexpr):
    """int32 [SEARCHED]: tiles from sequence `base` up to the end of each."""
    return gl.associative_scan(_tiles_of(base, query_start_ptr, num_seqs, BLOCK_Q, SEARCHED), 0, _add)


@gluon.jit
def _passed(ends, tile, SEARCHED: gl.constexpr):
    """(how many sequences end at or before a tile, tiles of those): `ends` rise, as do indices, so one maximum finds both."""
    index = 1 + gl.arange(0, SEARCHED, layout=ends.type.layout)
    both = gl.max(gl.where(ends <= tile, ends.to(gl.int64) << 32 | index, 0), 0)
    return (both & 0x7FFFFFFF).to(gl.int32), (both >> 32).to(gl.int32)


@gluon.jit
def locate(item, ends, query_start_ptr, seq_lens_ptr, num_seqs, KV_HEADS: gl.constexpr, BLOCK_Q: gl.constexpr,
           SEARCHED: gl.constexpr):  # fmt: skip
    """(sequence of an item, its first row of the step, its rows, the tile's first of them, tokens ahead of the step's, KV head).

    An item is a tile with a KV head. Behind a long history a head's tiles are neighbours: programs that run at a time
    read the same keys, which the L2 cache then holds. Else tiles that see as many keys are, so that the last ones are
    short. ends: tiles up to the end of each of the first SEARCHED sequences; of more sequences they are counted here.
    """
    tile = item // KV_HEADS
    sequence, before = _passed(ends, tile, SEARCHED)
    for base in range(SEARCHED, num_seqs, SEARCHED):
        if sequence == base:
            more = before + tile_ends(base, query_start_ptr, num_seqs, BLOCK_Q, SEARCHED)
            passed, end = _passed(more, tile, SEARCHED)
            sequence += passed
            before = gl.maximum(before, end)
    row_begin = gl.load(query_start_ptr + sequence)
    count = gl.load(query_start_ptr + sequence + 1) - row_begin
    offset = gl.load(seq_lens_ptr + sequence) - count
    item -= before * KV_HEADS
    kv_head = item % KV_HEADS
    tile -= before
    if offset >= gl.maximum(2 * count, LONG):
        of_head = (count + BLOCK_Q - 1) // BLOCK_Q
        kv_head = item // of_head
        tile = item % of_head
    return sequence, row_begin, count, tile * BLOCK_Q, offset, kv_head


@gluon.jit
def _field(fields, index: gl.constexpr):
    """One of [8] values that every thread holds."""
    return gl.sum(gl.where(gl.arange(0, 8, layout=fields.type.layout) == index, fields, 0), 0)


@gluon.jit
def key_tiles(first, count, offset, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr,
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
def tell(located, located_ready, items, row_begin, count, first, offset, kv_head):
    """Leave where a tile lies to the consumers, or a KV head of -1 after the last one.

    Its place of two is free: they were through with the tile before last when they freed its queries.
    """
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])  # all of [8] in every thread
    field = gl.arange(0, 8, layout=layout)
    fields = gl.where(field == 3, offset, kv_head)
    fields = gl.where(field == 2, first, fields)
    fields = gl.where(field == 1, count, fields)
    located.index(items % 2).store(gl.where(field == 0, row_begin, fields))
    barrier()
    mbarrier.arrive(located_ready.index(items % 2))


@gluon.jit
def told(located, located_ready, items):
    """What `tell` left: (row_begin, count, first, offset, kv_head)."""
    mbarrier.wait(located_ready.index(items % 2), (items // 2) & 1)
    fields = located.index(items % 2).load(gl.BlockedLayout([8], [32], [4], [0]))
    return _field(fields, 0), _field(fields, 1), _field(fields, 2), _field(fields, 3), _field(fields, 4)
