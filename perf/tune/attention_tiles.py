"""Times tiles and split rules of the attention kernels on a CUDA device, heads of 128 in groups of 4 and 2.

    python -m perf.tune.attention_tiles --parts prefill,decode --seconds 120
    python -m perf.tune.attention_tiles --parts blocks --seconds 60 --out blocks.json

Parts `prefill` and `decode` are in bfloat16: each candidate is checked against the present setting first, and printed
with what it takes. Part `blocks` reads 8-bit blocks with each candidate and blocks of bfloat16 with the present
setting, checks some rows against the reference, prints TB/s of the blocks and the best candidate of each case, and
writes all of it as a list. Inputs rotate through more memory than the L2 holds. Knows the kernels' tables by name;
changes no file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from unittest import mock

import torch

from pagegraph.kernels.attention import decode as attention_decode
from pagegraph.kernels.attention import prefill as attention_prefill
from pagegraph.kernels.attention import prefill_hopper, reference
from pagegraph.kernels.attention.cuda import _attend
from pagegraph.kernels.attention.decode import Tile
from pagegraph.kernels.gpu import measured
from perf.gpu.report import graph_seconds

DEVICE = "cuda"
BLOCK_SIZE = 16
MAX_LEN = 8192
BANDWIDTH = 4.24e12  # bytes/s that an H200 copies
HEADS = ((32, 8), (16, 8))  # of queries, of keys
PREFILL_TILES = (
    (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3),
)  # fmt: skip
DECODES = ((2, 256), (32, 640), (32, 1024), (256, 384))  # sequences, keys of each
DECODE_TILES = (
    *(Tile(64, 4, 3, programs, resident=3) for programs in (528, 1056, 264)),
    Tile(64, 4, 3, sum_late=True), Tile(64, 4, 4), Tile(64, 4, 2, resident=3), Tile(32, 4, 4, resident=3), Tile(128, 4, 2), Tile(128, 8, 3, 132, resident=1),
)  # fmt: skip
NUM_BLOCKS = ((1, 8000), (8, 8000), (32, 8000), (64, 2000), (256, 500))  # sequences, keys of each
TILES_OF_8_BITS = (
    Tile(64, 4, 4), Tile(64, 4, 4, 264), Tile(64, 4, 4, 1056), Tile(64, 4, 4, sum_late=True), Tile(64, 4, 3, sum_late=True),
    Tile(128, 4, 3), Tile(128, 4, 3, 264), Tile(128, 8, 3, sum_late=True), Tile(64, 2, 3), Tile(64, 2, 4), Tile(32, 2, 4), Tile(32, 4, 5, sum_late=True),
)  # fmt: skip
ROTATED = 320 << 20  # bytes of blocks that the calls of a case go through at least
TOLERANCE = 1e-2  # relative, of an output in bfloat16
WORKERS = 14


def work(
    lengths: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    copies: int,
    dtype: torch.dtype = torch.bfloat16,
    null_only: bool = False,
) -> list[tuple]:
    """Arguments of `_attend` for (new, all) tokens a sequence, over `copies` sets of blocks of `dtype`.

    null_only: no blocks but one, which every table names: sizes as they are in memory of nearly none, for compiling.
    """
    num_blocks = sum(-(-keys // BLOCK_SIZE) for _, keys in lengths)
    size = (1 if null_only else copies * num_blocks + 1, BLOCK_SIZE, kv_heads, 128)
    caches = [torch.randn(size, device=DEVICE, dtype=torch.bfloat16).to(dtype) for _ in range(2)]
    tokens = max(2, sum(new for new, _ in lengths))  # a step of one is padded to two
    query = torch.randn(tokens, heads, 128, device=DEVICE, dtype=torch.bfloat16)
    start = torch.tensor([0, *itertools.accumulate(new for new, _ in lengths)], dtype=torch.int32, device=DEVICE)
    keys = torch.tensor([keys for _, keys in lengths], dtype=torch.int32, device=DEVICE)
    sets = []
    for copy in range(copies):
        order = (torch.randperm(num_blocks) + 1 + copy * num_blocks).int()
        tables, at = torch.zeros(len(lengths), MAX_LEN // BLOCK_SIZE, dtype=torch.int32), 0
        for row, (_, length) in enumerate(lengths if not null_only else ()):
            used = -(-length // BLOCK_SIZE)
            tables[row, :used] = order[at : at + used]
            at += used
        sets.append((query, *caches, tables.to(DEVICE), start, keys, None, 128**-0.5, 0, 0.0, 0))
    return sets


def run(sets: list[tuple]) -> float:
    """Microseconds of one call."""
    return 1e6 * graph_seconds([lambda one=one: _attend(*one) for one in sets])


def compare(name: str, sets: list[tuple], expected: torch.Tensor) -> None:
    try:
        error = ((_attend(*sets[0]).float() - expected).norm() / expected.norm()).item()
        print(f"{name:80} {run(sets):9.1f} us   error {error:.1e}", flush=True)
    except Exception as problem:
        print(f"{name:80} {type(problem).__name__} {str(problem)[:80]}", flush=True)


@mock.patch.object(prefill_hopper, "multiprocessors", lambda device: 0)  # the tiles are the Triton kernel's
def prefill(end: float, out: list[dict]) -> None:
    present = measured(attention_prefill.TILES, torch.device(DEVICE))[2, 128]
    for (heads, kv_heads), lengths in zip(HEADS, ([(4096, 4096)] * 2, [(1024, 1024)] * 4)):
        sets = work(lengths, heads, kv_heads, 2)
        expected = _attend(*sets[0]).float()
        flop = sum(2 * 2 * new * keys / 2 for new, keys in lengths) * heads * 128
        print(
            f"prefill {lengths[0]} x {len(lengths)}, {heads}/{kv_heads} heads: {flop / 600e12 * 1e6:.0f} us at 600 TFLOP/s; present {present}"
        )
        for tile in PREFILL_TILES:
            if time.perf_counter() > end:
                break
            measured(attention_prefill.TILES, torch.device(DEVICE))[2, 128] = attention_prefill.Tile(*tile)
            compare(str(tile), sets, expected)
        measured(attention_prefill.TILES, torch.device(DEVICE))[2, 128] = present


@mock.patch.dict(attention_decode.FEW_TILES["H200"], clear=True)  # a candidate is for steps of any size
def decode(end: float, out: list[dict]) -> None:
    present = measured(attention_decode.TILES, torch.device(DEVICE))[2, 128]
    for (heads, kv_heads), (rows, keys) in itertools.product(HEADS, DECODES):
        sets = work([(1, keys)] * rows, heads, kv_heads, max(2, min(64, 4096 * 16 // (rows * keys))))
        expected = _attend(*sets[0]).float()
        floor = rows * keys * kv_heads * 128 * 2 * 2 / BANDWIDTH * 1e6
        print(f"decode {rows} x {keys}, {heads}/{kv_heads} heads: floor {floor:.1f} us; present {present}")
        for tile in DECODE_TILES:
            if time.perf_counter() > end:
                break
            measured(attention_decode.TILES, torch.device(DEVICE))[2, 128] = tile
            compare(str(tile), sets, expected)
        measured(attention_decode.TILES, torch.device(DEVICE))[2, 128] = present


def num_blocks(end: float, out: list[dict]) -> None:
    """Decode over 8-bit blocks by each candidate, beside bfloat16's present setting."""
    candidates = [
        (torch.bfloat16, measured(attention_decode.TILES, torch.device(DEVICE))[2, 128]),
        *((torch.float8_e4m3fn, tile) for tile in TILES_OF_8_BITS),
    ]
    start = time.perf_counter()
    cases = [
        (heads, case, dtype, tile) for heads, case, (dtype, tile) in itertools.product(HEADS, NUM_BLOCKS, candidates)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(WORKERS, (os.cpu_count() or 1) - 1)), mp_context=spawn) as pool:
        done, late = wait([pool.submit(reach, *one) for one in cases], timeout=max(0, (end - start) * 0.6))
        pool.shutdown(cancel_futures=True)
    wrong = {repr(one.exception())[:200] for one in done if one.exception()}
    print(
        f"{len(done)} compiled in {time.perf_counter() - start:.1f} s, {len(late)} left", *wrong, sep="\n", flush=True
    )
    for heads, case in itertools.product(HEADS, NUM_BLOCKS):
        print(f"{case[0]} x {case[1]}, {heads[0]}/{heads[1]} heads", flush=True)
        found = []
        for dtype, group in itertools.groupby(candidates, lambda one: one[0]):
            size = case[0] * case[1] * heads[1] * 128 * 2 * dtype.itemsize
            sets = work(lengths_of(case), *heads, math.ceil(ROTATED / size), dtype)
            for _, tile in group:
                if time.perf_counter() > end:
                    print("out of time", flush=True)
                    return
                row = dict(
                    heads=heads,
                    sequences=case[0],
                    keys=case[1],
                    num_blocks=str(dtype).removeprefix("torch."),
                    tile=tile._asdict(),
                )
                out.append(row | timed(sets, dtype, tile, size))
                found.append(out[-1] | {"tile": tile})
                print(f"    {row['num_blocks']:14} {written(tile):28} {described(found[-1])}", flush=True)
            del sets
        right = [row for row in found[1:] if not row["wrong"]]
        if right and not found[0]["wrong"]:
            best = min(right, key=lambda row: row["us"])
            print(
                f"  best {written(best['tile'])}: {best['us']:.1f} us, {found[0]['us'] / best['us']:.2f} x bfloat16",
                flush=True,
            )
    summary(out)


def lengths_of(case: tuple[int, int]) -> list[tuple[int, int]]:
    """One new token a sequence; a step of one is padded to two."""
    return [(1, case[1])] * case[0] + [(0, 0)] * (case[0] == 1)


def reach(heads: tuple[int, int], case: tuple[int, int], dtype: torch.dtype, tile: Tile) -> None:
    """Have the kernel of a case compiled, in a process of its own."""
    measured(attention_decode.TILES, torch.device(DEVICE))[dtype.itemsize, 128] = tile
    _attend(*work(lengths_of(case), *heads, 1, dtype, null_only=True)[0])


def timed(sets: list[tuple], dtype: torch.dtype, tile: Tile, size: int) -> dict:
    """us, TB/s of the blocks' bytes, relative error of the first and last live rows, and what went wrong."""
    key = dtype.itemsize, 128
    present, measured(attention_decode.TILES, torch.device(DEVICE))[key] = (
        measured(attention_decode.TILES, torch.device(DEVICE))[key],
        tile,
    )
    try:
        query, key_cache, value_cache, tables, start, lengths, sinks, *rest = sets[0]
        out, error = _attend(*sets[0]), 0.0
        for row in {0, int(start[-1]) - 1}:
            length = int(lengths[row])
            keys, values = (reference._read(cache, tables[row], length) for cache in (key_cache, value_cache))
            expected = reference.attend(query[row : row + 1], keys, values, sinks, *rest)
            error = max(error, ((out[row] - expected[0]).norm() / expected.norm()).item())
        us = run(sets)
        return dict(us=us, tb_s=size / us / 1e6, error=error, wrong="" if error < TOLERANCE else "wrong")
    except Exception as problem:
        return dict(us=math.nan, tb_s=math.nan, error=math.nan, wrong=f"{type(problem).__name__} {problem}"[:200])
    finally:
        measured(attention_decode.TILES, torch.device(DEVICE))[key] = present


def written(tile: Tile) -> str:
    cut = f"{tile.block_n} x {tile.num_warps} x {tile.num_stages}"
    return f"{cut}, {tile.programs}, {tile.resident}{', late' * tile.sum_late}"


def described(row: dict) -> str:
    return f"{row['us']:8.1f} us {row['tb_s']:6.2f} TB/s   error {row['error']:.1e} {row['wrong']}"


def summary(out: list[dict]) -> None:
    """A line a candidate: TB/s of each case, and the geometric mean of the times as fast as bfloat16."""
    whole = {(*row["heads"], row["sequences"], row["keys"]): row["us"] for row in out if row["blocks"] == "bfloat16"}
    print(
        f"\nTB/s by case, times as fast as bfloat16{'':3}"
        + "".join(f"{heads[0]}: {rows}x{keys}".rjust(13) for heads in HEADS for rows, keys in NUM_BLOCKS)
    )
    for tile in TILES_OF_8_BITS:
        cells = [row for row in out if row["blocks"] != "bfloat16" and row["tile"] == tile._asdict()]
        gains = [whole[*row["heads"], row["sequences"], row["keys"]] / row["us"] for row in cells if not row["wrong"]]
        mean = math.exp(sum(map(math.log, gains)) / len(gains)) if gains else math.nan
        print(f"{written(tile):28} mean {mean:7.3f} " + "".join(f"{row['tb_s']:13.2f}" for row in cells), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", default="prefill,decode", help="comma-separated, of prefill, decode, blocks")
    p.add_argument("--seconds", type=float, default=120)
    p.add_argument("--out", type=Path, help="file for what part blocks finds, JSON")
    args = p.parse_args()
    end = time.perf_counter() + args.seconds
    parts = {"prefill": prefill, "decode": decode, "blocks": num_blocks}
    out: list[dict] = []
    for name in args.parts.split(","):
        parts[name](end, out)
    if args.out:
        args.out.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
