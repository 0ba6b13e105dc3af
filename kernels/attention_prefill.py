"""Triton prefill attention: sequences with several query rows, ragged in one grid.

One program = (tile of one sequence's query rows, key head); a tile's matrix rows are (query row, query head of the
group). Sequences with one row are the decode kernel's. Grids follow from shapes, which tile a program takes is
found on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention_tiles import (
    MASKED,
    Tiles,
    accumulate,
    load_pages,
    load_rows,
    lowest_visible,
    scaled_logits,
    start_softmax,
)


def prefill_tiles(size: int, value_size: int, group: int, element_bytes: int) -> Tiles:
    """Tiles for head sizes D and Dv, `group` query heads a key head, within registers and shared memory of sm_90."""
    widest = max(triton.next_power_of_2(size), triton.next_power_of_2(value_size))
    least = max(16, triton.next_power_of_2(group))
    if element_bytes > 2:
        return Tiles(block_m=max(least, 32), block_n=32 if widest <= 128 else 16, warps=4, stages=2)
    if widest <= 128:
        return Tiles(block_m=max(least, 128), block_n=64, warps=8, stages=3)
    return Tiles(block_m=max(least, 64), block_n=32 if widest <= 256 else 16, warps=8, stages=2)


def count_tiles(tokens: int, sequences: int, rows: int) -> int:
    """Most tiles of `rows` query rows that sequences of two rows and more can need, given shapes alone."""
    return tokens // rows + min(sequences, tokens // 2)


def launch_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> None:
    """Fill the rows of `out` [T, Hq, Dv] that belong to sequences of two rows or more; shapes as in `kernels.ops`."""
    tokens, sequences = query.shape[0], block_tables.shape[0]
    page, heads, size = key_cache.shape[1:]
    query_heads, value_size = out.shape[1:]
    group = query_heads // heads
    tiles = prefill_tiles(size, value_size, group, key_cache.element_size())
    grid = count_tiles(tokens, sequences, tiles.block_m // group)
    if grid == 0:
        return
    prefill_kernel[(grid, heads)](
        query, key_cache, value_cache, block_tables, query_start, seq_lens, sinks, out,
        scale, sequences, query.stride(0), query.stride(1), query.stride(2), block_tables.stride(0), out.stride(0),
        HEADS=heads, GROUP=group, SIZE=size, VALUE_SIZE=value_size, PAGE=page,
        WINDOW=window, CHUNK=chunk, SOFTCAP=softcap, HAS_SINKS=sinks is not None,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_SIZE=triton.next_power_of_2(size),
        BLOCK_VALUE=triton.next_power_of_2(value_size), BLOCK_SEQUENCES=triton.next_power_of_2(sequences),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def _find_tile(query_start, sequences, program, ROWS: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr):
    """(found, sequence, first query row) of the program-th tile, each sequence's last, longest tile first."""
    sequence = tl.arange(0, BLOCK_SEQUENCES)
    inside = sequence < sequences
    first = tl.load(query_start + sequence, mask=inside, other=0)
    count = tl.load(query_start + sequence + 1, mask=inside, other=0) - first
    tiles = tl.where(count > 1, tl.cdiv(count, ROWS), 0)
    after = tl.cumsum(tiles, 0)
    hit = (program < after) & (program >= after - tiles)
    found = tl.sum(hit.to(tl.int32), 0)
    index = tl.sum(tl.where(hit, sequence, 0), 0)
    left = tl.sum(tl.where(hit, after - 1 - program, 0), 0)
    return found, index, left * ROWS


@triton.jit
def _attend(
    queries, largest, total, result, key_cache, value_cache, table, position, begin, stop, low, end, scale,
    HEADS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Tiles of keys begin..stop; BOUNDED masks by what each row sees, else every row sees every key."""
    keys = begin + tl.arange(0, BLOCK_N)
    pages = load_pages(table, keys, end, PAGE)
    for _ in range(begin, stop, BLOCK_N):
        # As in decode: the pages of the next tile load one iteration ahead.
        ahead = load_pages(table, keys + BLOCK_N, end, PAGE)
        tile = load_rows(key_cache, pages, keys, low, end, HEADS, SIZE, BLOCK_SIZE, PAGE, BOUNDED)
        logits = scaled_logits(queries, tile, scale, SOFTCAP)
        if BOUNDED:
            seen = keys[None, :] <= position[:, None]
            if (WINDOW > 0) or (CHUNK > 0):
                seen = seen & (keys[None, :] >= lowest_visible(position, WINDOW, CHUNK)[:, None])
            logits = tl.where(seen, logits, MASKED)
        tile = load_rows(value_cache, pages, keys, low, end, HEADS, VALUE_SIZE, BLOCK_VALUE, PAGE, BOUNDED)
        largest, total, result = accumulate(logits, tile, largest, total, result)
        keys += BLOCK_N
        pages = ahead
    return largest, total, result


@triton.jit
def prefill_kernel(
    query, key_cache, value_cache, block_tables, query_start, seq_lens, sinks, out,
    scale, sequences,
    query_stride_token, query_stride_head, query_stride_size, table_stride, out_stride_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Rows of the tile are query row * GROUP + head of the group; BLOCK_M % GROUP rows stay empty."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(1)
    found, sequence, first_row = _find_tile(query_start, sequences, tl.program_id(0), ROWS, BLOCK_SEQUENCES)
    if found == 0:
        return
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    length = tl.load(seq_lens + sequence)

    row = first_row + tl.arange(0, BLOCK_M) // GROUP
    inside = (tl.arange(0, BLOCK_M) < ROWS * GROUP) & (row < count)
    query_head = head * GROUP + tl.arange(0, BLOCK_M) % GROUP
    token = (start + row).to(tl.int64)
    at = tl.arange(0, BLOCK_SIZE)[None, :]
    queries = tl.load(
        query + token[:, None] * query_stride_token + query_head[:, None] * query_stride_head + at * query_stride_size,
        mask=inside[:, None] & (at < SIZE),
        other=0.0,
    )
    first = length - count + first_row
    end = tl.minimum(first + ROWS, length)
    low = lowest_visible(first, WINDOW, CHUNK)
    position = length - count + row
    table = block_tables + sequence.to(tl.int64) * table_stride
    key_cache += head * SIZE
    value_cache += head * VALUE_SIZE

    largest, total, result = start_softmax(sinks, query_head, inside, True, HAS_SINKS, BLOCK_M, BLOCK_VALUE)
    begin = low // BLOCK_N * BLOCK_N
    if WINDOW == 0 and CHUNK == 0:
        # Every row sees all keys up to the first row's own: whole tiles of those need no mask.
        masked_from = (first + 1) // BLOCK_N * BLOCK_N
        largest, total, result = _attend(
            queries, largest, total, result, key_cache, value_cache, table, position,
            begin, masked_from, low, end, scale,
            HEADS, SIZE, VALUE_SIZE, PAGE, WINDOW, CHUNK, SOFTCAP, BLOCK_N, BLOCK_SIZE, BLOCK_VALUE, False,
        )  # fmt: skip
        begin = masked_from
    largest, total, result = _attend(
        queries, largest, total, result, key_cache, value_cache, table, position,
        begin, end, low, end, scale,
        HEADS, SIZE, VALUE_SIZE, PAGE, WINDOW, CHUNK, SOFTCAP, BLOCK_N, BLOCK_SIZE, BLOCK_VALUE, True,
    )  # fmt: skip

    at = tl.arange(0, BLOCK_VALUE)[None, :]
    rows = out + token[:, None] * out_stride_token + query_head[:, None] * VALUE_SIZE + at
    result = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(rows, result, mask=inside[:, None] & (at < VALUE_SIZE))
