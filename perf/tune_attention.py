"""Times tiles and split rules of the attention kernels on a CUDA device, in bfloat16, heads of 128 in groups of 4 and 2.

    python perf/tune_attention.py --seconds 120

Each candidate is checked against the present setting first. Prints microseconds and what they are of the machine's
copy bandwidth or product rate. Knows the kernels' tables by name; changes no file.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from h200_report import graph_seconds  # noqa: E402

from kernels import attention_decode, attention_prefill  # noqa: E402
from kernels.cuda import _attend  # noqa: E402

PAGE = 16
MAX_LEN = 8192


def work(lengths: list[tuple[int, int]], heads: int, kv_heads: int, copies: int) -> list[tuple]:
    """Arguments of `_attend` for (new, all) tokens a sequence, over `copies` sets of pages."""
    pages = sum(-(-keys // PAGE) for _, keys in lengths)
    caches = [torch.randn(copies * pages + 1, PAGE, kv_heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    tokens = sum(new for new, _ in lengths)
    query = torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    start = torch.tensor([0, *itertools.accumulate(new for new, _ in lengths)], dtype=torch.int32, device="cuda")
    keys = torch.tensor([keys for _, keys in lengths], dtype=torch.int32, device="cuda")
    sets = []
    for copy in range(copies):
        order = (torch.randperm(pages) + 1 + copy * pages).int()
        tables, at = torch.zeros(len(lengths), MAX_LEN // PAGE, dtype=torch.int32), 0
        for row, (_, length) in enumerate(lengths):
            used = -(-length // PAGE)
            tables[row, :used] = order[at : at + used]
            at += used
        sets.append((query, *caches, tables.cuda(), start, keys, None, 128**-0.5, 0, 0.0, 0))
    return sets


def run(sets: list[tuple]) -> float:
    """Microseconds of one call."""
    return 1e6 * graph_seconds([lambda one=one: _attend(*one) for one in sets])


def compare(name: str, sets: list[tuple], expected: torch.Tensor) -> None:
    try:
        error = ((_attend(*sets[0]).float() - expected).norm() / expected.norm()).item()
        print(f"{name:60} {run(sets):9.1f} us   error {error:.1e}", flush=True)
    except Exception as problem:
        print(f"{name:60} {type(problem).__name__} {str(problem)[:80]}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=120)
    args = p.parse_args()
    end = time.perf_counter() + args.seconds
    present = attention_prefill.TILES[2, 128]
    for heads, kv_heads, lengths in ((32, 8, [(4096, 4096)] * 2), (16, 8, [(1024, 1024)] * 4)):
        sets = work(lengths, heads, kv_heads, 2)
        expected = _attend(*sets[0]).float()
        flop = sum(2 * 2 * new * keys / 2 for new, keys in lengths) * heads * 128
        print(f"prefill {lengths[0]} x {len(lengths)}, {heads}/{kv_heads} heads: {flop / 600e12 * 1e6:.0f} us at 600 TFLOP/s; present {present}")
        for tile in ((64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3)):
            if time.perf_counter() > end:
                break
            attention_prefill.TILES[2, 128] = attention_prefill.Tile(*tile)
            compare(str(tile), sets, expected)
        attention_prefill.TILES[2, 128] = present
    present = attention_decode.TILES[2, 128]
    fixed = attention_decode.MIN_SPLIT, attention_decode.TARGET_PROGRAMS
    for (heads, kv_heads), (rows, keys) in itertools.product(((32, 8), (16, 8)), ((2, 256), (32, 640), (32, 1024), (256, 384))):
        sets = work([(1, keys)] * rows, heads, kv_heads, max(2, min(64, 4096 * 16 // (rows * keys))))
        expected = _attend(*sets[0]).float()
        floor = rows * keys * kv_heads * 128 * 2 * 2 / 4.24e12 * 1e6
        print(f"decode {rows} x {keys}, {heads}/{kv_heads} heads: floor {floor:.1f} us; present {present} {fixed}")
        for tile, (least, programs) in itertools.product(
            ((64, 4, 3), (64, 4, 4), (64, 4, 2), (32, 4, 4), (128, 4, 2), (128, 8, 3)), ((64, 528), (256, 528), (64, 1056), (64, 264))
        ):
            if time.perf_counter() > end:
                break
            if (least, programs) != fixed and tile != present[:3]:
                continue
            attention_decode.TILES[2, 128] = attention_decode.Tile(*tile)
            attention_decode.MIN_SPLIT, attention_decode.TARGET_PROGRAMS = least, programs
            compare(f"{tile} min_split {least} programs {programs}", sets, expected)
        attention_decode.TILES[2, 128] = present
        attention_decode.MIN_SPLIT, attention_decode.TARGET_PROGRAMS = fixed


if __name__ == "__main__":
    main()
