"""Triton: paged attention of few query tokens a sequence, and how it is shared out over programs.

A unit is the query heads that share a KV head, of as many neighbouring rows of a sequence as one BLOCK_M has room for. The
tiles of keys of all units of a step lie end to end, and each program takes an equal share of them, whatever the
sequences' lengths; where that search would cost more than it brings, each unit is split alike (`shares.py`). Of a unit in
several parts the last program to arrive merges what was found, in order, so the result does not depend on timing
(`decode_part.py`). With BY_TOKEN the kernel computes every row, so it is right for any ragged step (verification of a few
draft tokens among them); otherwise it computes the sequences that have one row and leaves the rest to prefill. Padding
rows are written as 0. The grid depends on sizes alone; lengths are read on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.attention.decode_part import attend_part
from pagegraph.kernels.attention.shares import (
    padded_seqs,
    part_of,
    sequence_of,
    split,
    tiles_up_to,
    zero_heads,
    zero_padding,
)
from pagegraph.kernels.attention.softmax import LOG2E, dot_precision
from pagegraph.kernels.gpu import Gpu, measured
from pagegraph.kernels.pdl import arrival_counts, dependent, wait

SMS = 132  # of an H100 or H200


class Tile(NamedTuple):
    """How a program of the decode kernel is cut, and how many there are."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 4 * SMS  # at least where rows are split alike, if they are long enough
    resident: int = 2  # that run on a multiprocessor at a time: as many take equal shares
    sum_late: bool = False  # weights are summed up after the last tile: fewer meetings of the warps, more registers

    @property
    def registers(self) -> int:
        """Registers a thread may have for the resident programs."""
        return min(255, 65536 // (32 * self.num_warps * self.resident) // 8 * 8)


# By (bytes an element of the blocks, padded head size). Float32, whatever the blocks hold, is computed by FMA in full
# precision and needs the registers.
TILES: dict[Gpu, dict[tuple[int, int], Tile]] = {
    "H200": {
        (1, 32): Tile(64, 4, 4),
        (1, 64): Tile(64, 4, 4, resident=3, sum_late=True),
        (1, 128): Tile(64, 2, 3, 2 * SMS, resident=4, sum_late=True),
        (1, 256): Tile(32, 4, 4, sum_late=True),
        (2, 16): Tile(64, 4, 4),
        (2, 32): Tile(64, 4, 4),
        (2, 64): Tile(64, 4, 4, resident=3),
        (2, 128): Tile(64, 4, 3, resident=3),
        (2, 256): Tile(32, 4, 3),
        (4, 16): Tile(32, 4, 3),
        (4, 32): Tile(32, 4, 3),
        (4, 64): Tile(32, 4, 3),
        (4, 128): Tile(16, 4, 3),
        (4, 256): Tile(16, 8, 2, resident=1),
    },
}
# Faster for few sequences: how many at most -> tile.
FEW_TILES: dict[Gpu, dict[tuple[int, int], dict[int, Tile]]] = {
    "H200": {(2, 128): {2: Tile(128, 8, 3, SMS, resident=1), 32: Tile(64, 4, 4, 2 * SMS)}}
}
MIN_SHARE = 128  # keys: with few sequences even short ones are shared out
MAX_SPLITS = 32
FEW_ROWS = 4  # whose keys are split alike, which takes no search
MANY_ROWS = 32  # above it too, if no sequence can have more keys than MAX_ALIKE
MAX_ALIKE = 8192


@triton.jit(do_not_specialize=["num_seqs", "num_rows"])
def decode_kernel(
    out_ptr,
    acc_ptr,
    m_ptr,
    l_ptr,
    arrivals_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    sinks_ptr,
    scale,
    num_seqs,
    num_rows,
    query_token_stride,
    query_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_LATE: tl.constexpr,
    SPLITS: tl.constexpr,
    SEQS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MERGED: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    ASSEMBLES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    memory = (
        out_ptr, acc_ptr, m_ptr, l_ptr, arrivals_ptr, query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr
    )  # fmt: skip
    strides = (query_token_stride, query_head_stride, table_stride)
    if SPLITS > 0:
        part, live, padding = split(
            query_start_ptr, seq_lens_ptr, num_seqs, PACK, KV_HEADS, SPLITS, BLOCK_N, MIN_TILES, WINDOW, CHUNK
        )
        if padding:
            zero_heads(out_ptr, tl.program_id(0) // SPLITS, GROUP * VALUE_SIZE, BLOCK_M * VALUE_PAD)
        if live:
            attend_part(
                part, memory, scale, strides, BLOCK_SIZE, KV_HEADS, GROUP, PACK, HEAD_SIZE, VALUE_SIZE, HEAD_PAD, VALUE_PAD,
                BLOCK_M, BLOCK_N, SUM_LATE, MERGED, WINDOW, CHUNK, SOFTCAP, HAS_SINKS, PRECISION, ASSEMBLES,
            )  # fmt: skip
    else:
        ends = tiles_up_to(
            query_start_ptr, seq_lens_ptr, num_seqs, SEQS, PACK, KV_HEADS, BLOCK_N, WINDOW, CHUNK, BY_TOKEN
        )
        tiles = tl.max(ends, 0)
        share = tl.maximum((tiles + tl.num_programs(0) - 1) // tl.num_programs(0), MIN_TILES)
        at = tl.program_id(0) * share
        stop = tl.minimum(at + share, tiles)
        sequence, before, behind = at, at, at  # of no sequence yet
        while at < stop:
            if at >= behind:
                sequence, before, behind = sequence_of(at, ends)
            part, at = part_of(
                at, stop, share, sequence, before, query_start_ptr, seq_lens_ptr,
                PACK, KV_HEADS, BLOCK_N, WINDOW, CHUNK,
            )  # fmt: skip
            attend_part(
                part, memory, scale, strides, BLOCK_SIZE, KV_HEADS, GROUP, PACK, HEAD_SIZE, VALUE_SIZE, HEAD_PAD, VALUE_PAD,
                BLOCK_M, BLOCK_N, SUM_LATE, MERGED, WINDOW, CHUNK, SOFTCAP, HAS_SINKS, PRECISION, ASSEMBLES,
            )  # fmt: skip
        zero_padding(out_ptr, query_start_ptr, num_seqs, num_rows, KV_HEADS * GROUP * VALUE_SIZE)


def by_token(tokens: int, num_seqs: int) -> bool:
    """Whether the kernel computes every row of a step of these sizes: there is a row a sequence at most."""
    return tokens <= num_seqs


class LaunchShape(NamedTuple):
    """How programs are cut: the tile, the padded head sizes, rows of a unit, splits of one or 0 for equal shares, how many programs."""

    tile: Tile
    head_pad: int
    value_pad: int
    pack: int
    splits: int
    programs: int


def launch_shape(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor) -> LaunchShape:
    """How a step of query [T, Hq, D] over blocks [blocks, block_size, Hkv, D] is shared out, from sizes alone."""
    rows, width, kv_heads = query.shape[0], key_cache.element_size(), key_cache.shape[2]
    every_row = by_token(rows, block_tables.shape[0])
    smallest = 32 if width == 1 else 16
    head_pad = max(smallest, triton.next_power_of_2(query.shape[2]))
    value_pad = max(smallest, triton.next_power_of_2(value_cache.shape[3]))
    key = (4 if query.element_size() == 4 else width, max(head_pad, value_pad))
    few = measured(FEW_TILES, query.device).get(key, {})
    limit = min((limit for limit in few if limit >= min(rows, block_tables.shape[0])), default=None)
    tile = few[limit] if limit else measured(TILES, query.device)[key]
    group = query.shape[1] // kv_heads
    pack = block_m(group) // group if every_row else 1
    units, length = rows * kv_heads, block_tables.shape[1] * key_cache.shape[1]
    alike = rows <= FEW_ROWS or (length <= MAX_ALIKE and (rows > MANY_ROWS or not few))
    if not every_row or not alike:
        return LaunchShape(tile, head_pad, value_pad, pack, 0, SMS * tile.resident)
    wanted = min(-(-tile.programs // units), -(-length // MIN_SHARE))
    splits = min(int(triton.next_power_of_2(wanted)), MAX_SPLITS)
    return LaunchShape(tile, head_pad, value_pad, pack if rows > MANY_ROWS else 1, splits, units * splits)


def block_m(group: int) -> int:
    """Lanes of a unit: no tensor core multiplies fewer."""
    return max(16, int(triton.next_power_of_2(group)))


def parts_found(programs: int, lanes: int, value_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Where programs leave what they found of a unit: acc [programs, 2, BLOCK_M, Dv], m_i and l_i [programs, 2, BLOCK_M], arrival counts."""
    acc = torch.empty(programs, 2, lanes, value_size, dtype=torch.float32, device=device)
    m_i, l_i = torch.empty(2, programs, 2, lanes, dtype=torch.float32, device=device)
    return acc, m_i, l_i, arrival_counts(device)


def attend_rows(
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
    """Write rows of out [T, Hq, Dv]: all of them if `by_token`, else those of the sequences with one row and padding rows."""
    block_size, kv_heads, value_size = value_cache.shape[1:]
    group = query.shape[1] // kv_heads
    num_seqs = block_tables.shape[0]
    tile, head_pad, value_pad, pack, splits, programs = launch_shape(query, key_cache, value_cache, block_tables)
    if key_cache.element_size() == 1:
        key_cache, value_cache = key_cache.view(torch.int16), value_cache.view(torch.int16)
    decode_kernel[(programs,)](
        out,
        *parts_found(programs, block_m(group), value_size, query.device),
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        seq_lens,
        sinks if sinks is not None else query,
        scale if softcap else scale * LOG2E,
        num_seqs,
        query.shape[0],
        *query.stride()[:2],
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_SIZE=query.shape[2],
        VALUE_SIZE=value_size,
        HEAD_PAD=head_pad,
        VALUE_PAD=value_pad,
        BLOCK_M=block_m(group),
        PACK=pack,
        BLOCK_N=tile.block_n,
        SUM_LATE=tile.sum_late,
        SPLITS=splits,
        SEQS=padded_seqs(num_seqs),
        MIN_TILES=max(1, MIN_SHARE // tile.block_n),
        MERGED=1 if query.element_size() == 4 else max(1, 8192 // (block_m(group) * value_pad)),
        WINDOW=window,
        CHUNK=chunk,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        PRECISION=dot_precision(max(head_pad, value_pad)),
        BY_TOKEN=by_token(query.shape[0], num_seqs),
        ASSEMBLES=query.device.type != "cpu",  # the interpreter knows no inline assembly
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=None if splits else tile.registers,
        **dependent(query.device),
    )
