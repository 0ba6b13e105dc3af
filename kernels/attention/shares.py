"""Triton device functions: which tiles of keys of a step each program of the decode kernel takes.

A unit is up to PACK neighbouring rows of one sequence with one KV head; `rows` rows have ceil(rows / PACK) units a head. All
units of a sequence count as many tiles of keys, so that a tile's unit follows from its index alone. Knows metadata
only, no memory of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagegraph.kernels.attention.softmax import first_key, last_not_above

ZEROED = tl.constexpr(2048)  # elements of padding rows at a time


def padded_seqs(num_seqs: int) -> int:
    """How many sequences are counted at once: few sizes, for each is compiled on its own."""
    return 32 if num_seqs <= 32 else max(256, int(triton.next_power_of_2(num_seqs)))


@triton.jit
def _key_tiles(rows, length, PACK: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Tiles of keys that a unit of a sequence sees at most; exact for one row."""
    keys = length
    if WINDOW > 0 or CHUNK > 0:
        spread = tl.minimum(rows, PACK) - 1
        if WINDOW > 0:
            keys = tl.minimum(keys, WINDOW + spread)
        if CHUNK > 0:
            keys = tl.minimum(keys, CHUNK + spread)
        keys = tl.where(rows == 1, length - first_key(length - 1, WINDOW, CHUNK), keys)
    return (keys + BLOCK_N - 1) // BLOCK_N


@triton.jit
def tiles_up_to(
    query_start_ptr, seq_lens_ptr, num_seqs, SEQS: tl.constexpr, PACK: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """int32 [SEQS]: tiles up to the end of each sequence; without BY_TOKEN those of more than one row have none."""
    index = tl.arange(0, SEQS)
    there = index < num_seqs
    begin = tl.load(query_start_ptr + index, mask=there, other=0)
    rows = tl.load(query_start_ptr + index + 1, mask=there, other=0) - begin
    length = tl.load(seq_lens_ptr + index, mask=there, other=0)
    each = _key_tiles(rows, length, PACK, BLOCK_N, WINDOW, CHUNK)
    taken = rows > 0 if BY_TOKEN else rows == 1
    return tl.cumsum(tl.where(taken, (rows + PACK - 1) // PACK * KV_HEADS * each, 0), 0)


@triton.jit
def sequence_of(tile, ends):
    """(sequence of a tile, tiles before the sequence, tiles up to its end)."""
    passed = ends <= tile
    before = tl.max(tl.where(passed, ends, 0), 0)
    behind = tl.min(tl.where(passed, 0x7FFFFFFF, ends), 0)
    return tl.sum(passed.to(tl.int32), 0), before, behind


@triton.jit
def part_of(
    at, stop, share, sequence, before, query_start_ptr, seq_lens_ptr,
    PACK: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of tiles `at` to `stop` those of the first unit, as `attend_part` takes them, and the tile behind them."""
    row_begin = tl.load(query_start_ptr + sequence)
    rows = tl.load(query_start_ptr + sequence + 1) - row_begin
    length = tl.load(seq_lens_ptr + sequence)
    each = _key_tiles(rows, length, PACK, BLOCK_N, WINDOW, CHUNK)
    unit = (at - before) // each
    begin = before + unit * each  # the unit's first tile
    through = tl.minimum(each, stop - begin)
    first = begin // share
    parts = (begin + each - 1) // share - first + 1
    kv_head, first_row = unit % KV_HEADS, unit // KV_HEADS * PACK
    part = (sequence, row_begin, rows, length, kv_head, first_row, at - begin, through, each, parts, first)
    return part, begin + through


@triton.jit
def split(
    query_start_ptr, seq_lens_ptr, num_seqs, PACK: tl.constexpr, KV_HEADS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What a program does where the units of all rows are split alike: (part, as `attend_part` takes it; whether there is one;
    whether it is the first of a padding row's head). The first row of a unit stands for it."""
    index = tl.program_id(0) // SPLITS
    number = tl.program_id(0) % SPLITS
    row = index // KV_HEADS
    sequence = last_not_above(query_start_ptr, row, num_seqs, row, 1)
    row_begin = tl.load(query_start_ptr + sequence)
    rows = tl.load(query_start_ptr + sequence + 1) - row_begin
    length = tl.load(seq_lens_ptr + sequence)
    first_row = row - row_begin
    behind = length - rows + tl.minimum(first_row + PACK, rows)  # of the keys that the unit sees
    keys = behind - first_key(length - rows + first_row, WINDOW, CHUNK)
    each = (keys + BLOCK_N - 1) // BLOCK_N
    share = tl.maximum((each + SPLITS - 1) // SPLITS, MIN_TILES)
    tile = number * share
    parts = (each + share - 1) // share
    part = (
        sequence, row_begin, rows, length, index % KV_HEADS, first_row,
        tile, tl.minimum(tile + share, each), each, parts, index * SPLITS,
    )  # fmt: skip
    return part, (first_row < rows) & (first_row % PACK == 0) & (tile < each), (first_row >= rows) & (number == 0)


@triton.jit
def seen(token, inside, position, PACK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Which of the keys of a tile [N] rows at `position` [M] see; of one row all that are inside."""
    visible = inside[None, :]
    if PACK > 1:
        visible = visible & (token[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (token[None, :] > position[:, None] - WINDOW)
        if CHUNK > 0:
            visible = visible & (token[None, :] // CHUNK == position[:, None] // CHUNK)
    return visible


@triton.jit
def zero_padding(out_ptr, query_start_ptr, num_seqs, num_rows, ROW: tl.constexpr):
    """Rows behind the last sequence, of ROW elements each, shared by all programs."""
    lane = tl.arange(0, ZEROED)
    begin = tl.load(query_start_ptr + num_seqs) * ROW
    for at in range(begin + tl.program_id(0) * ZEROED, num_rows * ROW, tl.num_programs(0) * ZEROED):
        tl.store(out_ptr + at + lane, tl.zeros([ZEROED], out_ptr.dtype.element_ty), mask=at + lane < num_rows * ROW)


@triton.jit
def zero_heads(out_ptr, index, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The query heads of one row and KV head, SIZE elements in all."""
    lane = tl.arange(0, PADDED)
    tl.store(out_ptr + index.to(tl.int64) * SIZE + lane, tl.zeros([PADDED], out_ptr.dtype.element_ty), mask=lane < SIZE)
