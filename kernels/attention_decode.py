"""Triton decode attention: sequences with one query row, keys split over programs, partial results merged.

One program = (sequence, key head, split). The query heads that share the key head fill the matrix unit's rows.
Sequences with another number of rows are left alone. Grids follow from shapes, lengths are read on the device.
How many splits there are depends on the number of sequences, so a row's rounding does too.
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

PROGRAMS = 528  # four for each of the 132 multiprocessors of a Hopper GPU
LONGEST_SPLIT = 4096  # keys; above it one long sequence among short ones would finish alone
SHORTEST_SPLIT = 128  # keys; below it the merge costs more than the split gains
MERGE_SPLITS = 16
MERGE_WARPS = 4


def decode_tiles(size: int, value_size: int, group: int, element_bytes: int) -> Tiles:
    """Tiles for head sizes D and Dv, `group` query heads a key head: about 96 KiB of keys and values in flight."""
    row = (triton.next_power_of_2(size) + triton.next_power_of_2(value_size)) * element_bytes
    block_n = 64 if row <= 512 else 32 if row <= 1024 else 16
    return Tiles(block_m=max(16, triton.next_power_of_2(group)), block_n=block_n, warps=4, stages=3)


def count_splits(sequences: int, heads: int, table_width: int, page: int) -> int:
    """Splits a sequence: enough programs to fill the GPU, no split above LONGEST_SPLIT or wholly below SHORTEST_SPLIT."""
    keys = table_width * page
    wanted = max(triton.cdiv(PROGRAMS, sequences * heads), triton.cdiv(keys, LONGEST_SPLIT))
    return min(wanted, triton.cdiv(keys, SHORTEST_SPLIT))


def launch_decode(
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
    """Fill the rows of `out` [T, Hq, Dv] that belong to sequences of exactly one row; shapes as in `kernels.ops`."""
    sequences, table_width = block_tables.shape
    page, heads, size = key_cache.shape[1:]
    query_heads, value_size = out.shape[1:]
    group = query_heads // heads
    tiles = decode_tiles(size, value_size, group, key_cache.element_size())
    splits = count_splits(sequences, heads, table_width, page)
    partial = out.new_empty((sequences, query_heads, splits, value_size) if splits > 1 else (1,), dtype=torch.float32)
    weights = out.new_empty((sequences, query_heads, splits) if splits > 1 else (1,), dtype=torch.float32)
    block_value = triton.next_power_of_2(value_size)
    shared = {
        "GROUP": group,
        "VALUE_SIZE": value_size,
        "WINDOW": window,
        "CHUNK": chunk,
        "BLOCK_N": tiles.block_n,
        "BLOCK_VALUE": block_value,
        "SHORTEST": SHORTEST_SPLIT,
    }
    decode_kernel[(sequences, heads, splits)](
        query, key_cache, value_cache, block_tables, query_start, seq_lens, sinks, out, partial, weights,
        scale, splits, query.stride(0), query.stride(1), query.stride(2), block_tables.stride(0), out.stride(0),
        HEADS=heads, SIZE=size, PAGE=page, SOFTCAP=softcap, HAS_SINKS=sinks is not None,
        BLOCK_M=tiles.block_m, BLOCK_SIZE=triton.next_power_of_2(size),
        **shared, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(sequences, query_heads)](
            query_start, seq_lens, partial, weights, out, splits, out.stride(0),
            HEADS=heads, BLOCK_SPLITS=triton.next_power_of_2(splits), STEP=MERGE_SPLITS,
            **shared, num_warps=MERGE_WARPS,
        )  # fmt: skip


@triton.jit
def _share(length, begin, splits, BLOCK_N: tl.constexpr, SHORTEST: tl.constexpr):
    """Keys a split takes of begin..length, a multiple of the tile; the last used split takes what is left."""
    even = tl.cdiv(tl.cdiv(length - begin, splits), BLOCK_N) * BLOCK_N
    return tl.maximum(even, SHORTEST)


@triton.jit
def decode_kernel(
    query, key_cache, value_cache, block_tables, query_start, seq_lens, sinks, out, partial, weights,
    scale, splits,
    query_stride_token, query_stride_head, query_stride_size, table_stride, out_stride_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    SHORTEST: tl.constexpr,
):  # fmt: skip
    """partial float32 [S, Hq, splits, Dv]; weights float32 [S, Hq, splits], log2 of each part's softmax sum."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    length = tl.load(seq_lens + sequence)
    low = lowest_visible(length - 1, WINDOW, CHUNK)
    # Tiles start at multiples of BLOCK_N, so a split's first tile may begin below the window.
    aligned = low // BLOCK_N * BLOCK_N
    share = _share(length, aligned, splits, BLOCK_N, SHORTEST)
    begin = aligned + split * share
    if begin >= length:
        return
    end = tl.minimum(begin + share, length)

    row = tl.arange(0, BLOCK_M)
    query_head = head * GROUP + row
    at = tl.arange(0, BLOCK_SIZE)[None, :]
    queries = tl.load(
        query + token * query_stride_token + query_head[:, None] * query_stride_head + at * query_stride_size,
        mask=(row < GROUP)[:, None] & (at < SIZE),
        other=0.0,
    )
    largest, total, result = start_softmax(sinks, query_head, row < GROUP, split == 0, HAS_SINKS, BLOCK_M, BLOCK_VALUE)

    table = block_tables + sequence.to(tl.int64) * table_stride
    keys = begin + tl.arange(0, BLOCK_N)
    pages = load_pages(table, keys, end, PAGE)
    for _ in range(begin, end, BLOCK_N):
        # The next tile's pages are on their way while this tile is read: a table load that this very
        # iteration's keys waited for would take a pipeline stage of its own.
        ahead = load_pages(table, keys + BLOCK_N, end, PAGE)
        tile = load_rows(key_cache + head * SIZE, pages, keys, low, end, HEADS, SIZE, BLOCK_SIZE, PAGE, True)
        logits = scaled_logits(queries, tile, scale, SOFTCAP)
        logits = tl.where(((keys >= low) & (keys < end))[None, :], logits, MASKED)
        tile = load_rows(
            value_cache + head * VALUE_SIZE, pages, keys, low, end, HEADS, VALUE_SIZE, BLOCK_VALUE, PAGE, True
        )
        largest, total, result = accumulate(logits, tile, largest, total, result)
        keys += BLOCK_N
        pages = ahead

    result = result / total[:, None]
    at = tl.arange(0, BLOCK_VALUE)[None, :]
    inside = (row < GROUP)[:, None] & (at < VALUE_SIZE)
    if length - aligned <= share:
        rows = out + token * out_stride_token + query_head[:, None] * VALUE_SIZE + at
        tl.store(rows, result.to(out.dtype.element_ty), mask=inside)
    else:
        part = (sequence.to(tl.int64) * (HEADS * GROUP) + query_head) * splits + split
        tl.store(partial + part[:, None] * VALUE_SIZE + at, result, mask=inside)
        tl.store(weights + part, largest + tl.log2(total), mask=row < GROUP)


@triton.jit
def merge_kernel(
    query_start, seq_lens, partial, weights, out, splits, out_stride_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_SIZE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_VALUE: tl.constexpr, SHORTEST: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one (sequence, query head) by their softmax sums; a sequence in one split is done already."""
    sequence, query_head = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    length = tl.load(seq_lens + sequence)
    aligned = lowest_visible(length - 1, WINDOW, CHUNK) // BLOCK_N * BLOCK_N
    share = _share(length, aligned, splits, BLOCK_N, SHORTEST)
    used = tl.cdiv(length - aligned, share)
    if used <= 1:
        return
    part = (sequence.to(tl.int64) * (HEADS * GROUP) + query_head) * splits
    split = tl.arange(0, BLOCK_SPLITS)
    # Splits that were not used hold whatever memory held: they are never loaded.
    sums = tl.load(weights + part + split, mask=split < used, other=float("-inf"))
    largest = tl.max(sums, 0)
    total = tl.sum(tl.exp2(sums - largest), 0)
    at = tl.arange(0, BLOCK_VALUE)
    result = tl.zeros([BLOCK_VALUE], tl.float32)
    for first in range(0, used, STEP):
        split = first + tl.arange(0, STEP)
        sums = tl.load(weights + part + split, mask=split < used, other=float("-inf"))
        rows = partial + (part + split)[:, None] * VALUE_SIZE + at[None, :]
        tile = tl.load(rows, mask=(split < used)[:, None] & (at < VALUE_SIZE)[None, :], other=0.0)
        result += tl.sum(tile * tl.exp2(sums - largest)[:, None], 0)
    result = result / total
    tl.store(
        out + token * out_stride_token + query_head * VALUE_SIZE + at,
        result.to(out.dtype.element_ty),
        mask=at < VALUE_SIZE,
    )
