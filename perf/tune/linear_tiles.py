"""Measures the tiles of `kernels.linear.skinny_gemm` against cuBLAS, and those of `kernels.linear.gemv`, on a CUDA device.

Prints `TABLE` and `GEMV_TABLE` of `kernels/linear/tiles.py`.

    python -m perf.tune.linear_tiles --out perf/results --seconds 120

Each product is checked first, then timed in a CUDA graph over copies of the weight that together exceed the L2
cache. Candidates are compiled by parallel processes before. Knows the shapes of the measured models only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import time
from pathlib import Path

import torch
from torch.nn import functional

from pagegraph.kernels.linear import reference
from pagegraph.kernels.linear.gemv import gemv, gemv_kernel
from pagegraph.kernels.linear.skinny_gemm import skinny_gemm, skinny_gemm_kernel
from pagegraph.kernels.linear.tiles import MAX_SINGLE_ROWS, GemvTile, Tile
from pagegraph.kernels.pdl import dependent

SHAPES = {  # (N, K) by model
    "0.6b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)],
    "8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "30b-a3b-24l": [(5120, 2048), (2048, 4096), (128, 2048), (151936, 2048)],
    "qwen3-next-12l": [(12352, 2048), (9216, 2048), (512, 2048), (2048, 512)],
    "gpt-oss-20b": [(5120, 2880), (2880, 4096), (32, 2880), (201088, 2880)],
    "nemotron-h-8b": [(18560, 4096), (4096, 8192), (21504, 4096), (4096, 21504), (131072, 4096)],
}
# Products of normalised rows.
NORMED = {(4096, 1024), (6144, 1024), (6144, 4096), (28672, 4096), (5120, 2048), (128, 2048), (5120, 2880), (32, 2880)}
GATED = {(6144, 1024), (28672, 4096)}  # whose halves are gate and up
ROWS = (1, 2, 4, 8, 16, 32, 64)
L2_BYTES = 300 << 20  # several times the cache
BANDWIDTH = 4.3e12  # bytes a second, for the floor that is printed


def candidates(out_size: int, size: int, block_t: int) -> list[Tile]:
    found = []
    for (block_n, block_k), warps in itertools.product(
        ((16, 256), (32, 128), (32, 256), (64, 128), (64, 64), (128, 64)), (4,)
    ):
        if size % block_k:
            continue
        stages = next((s for s in (6, 5, 4, 3, 2) if s * (block_n + block_t) * block_k * 2 <= 110 << 10), 2)
        tiles = -(-out_size // block_n)
        for split in (1, 2, 4, 8, 16):
            steps = size // (split * block_k)
            enough = min(96, out_size * size >> 13)  # programs, of a weight that has so many
            if steps >= 2 and (split == 1 or tiles * split <= 1056) and tiles * split >= enough:
                found.append(Tile(block_n, block_k, split, warps, min(stages, max(2, steps))))
    return found


def row_candidates(out_size: int, size: int, rows: int) -> list[GemvTile]:
    """Tiles whose sums fit in registers; wide enough that warps lie side by side along the columns."""
    gates = 2 if (out_size, size) in GATED else 1
    blocks = [
        (n, warps) for n, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)) if n * gates * (rows + 8) <= 192
    ]
    return [
        GemvTile(n, 256 * warps, warps, ahead)
        for (n, warps), ahead in itertools.product(blocks, (1, 2, 3))
        if 256 * warps * ahead <= size
        and -(-out_size // (n * gates)) >= min(256, out_size)
        and (ahead == 1 or n * gates * ahead <= 12)
    ]


def compile_ahead(job: tuple[int, int, int, Tile | GemvTile]) -> None:
    """Put the kernel of one candidate into Triton's cache."""
    rows, out_size, size, tile = job
    bf16 = torch.bfloat16
    if len(tile) == len(GemvTile._fields):
        parts = _parts(out_size, size)
        gemv_kernel.warmup(
            bf16, bf16, bf16, bf16, bf16, bf16, bf16, bf16, 1e-6, size, HAS_LIVE=False, SHARE=0, ROWS=rows, N=out_size // 2 if parts["GATED"] else out_size, K=size,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, AHEAD=tile.ahead, HAS_BIAS=False, num_warps=tile.num_warps, grid=(1,), **parts,
            **dependent(torch.device("cuda")),
        )  # fmt: skip
        return
    partial = torch.float32 if tile.split_k > 1 else bf16
    counter = torch.int32 if tile.split_k > 1 else bf16
    skinny_gemm_kernel.warmup(
        bf16, partial, counter, bf16, bf16, bf16, rows, size, N=out_size, K=size, BLOCK_T=max(16, rows), BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, SPLIT_K=tile.split_k, HAS_BIAS=False, GATED=False, PRECISION="tf32", num_warps=tile.num_warps,
        num_stages=tile.num_stages, grid=(1,), **dependent(torch.device("cuda")),
    )  # fmt: skip


def microseconds(run, weights: list[torch.Tensor]) -> float:
    """Of one product, in a graph over all copies of the weight."""
    run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    graph.replay()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(weights))
    return sorted(times)[len(times) // 2]


def measure(out_size: int, size: int, rows: int) -> dict:
    copies = max(2, -(-L2_BYTES // (out_size * size * 2)))
    weights = [torch.randn(out_size, size, device="cuda", dtype=torch.bfloat16) for _ in range(min(copies, 64))]
    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    expected = functional.linear(x.float(), weights[0].float())
    cublas = microseconds(lambda w: functional.linear(x, w), weights)
    best, best_us, failed = None, float("inf"), []
    for tile in candidates(out_size, size, max(16, rows)):
        try:
            out = skinny_gemm(x, weights[0], None, tile)
            error = ((out.float() - expected).norm() / expected.norm()).item()
            if not error < 1e-2:
                failed.append((tile, error))
                continue
            us = microseconds(lambda w, tile=tile: skinny_gemm(x, w, None, tile), weights)
        except Exception as problem:
            failed.append((tile, repr(problem)[:200]))
            continue
        if us < best_us:
            best, best_us = tile, us
    floor = out_size * size * 2 / BANDWIDTH * 1e6
    return dict(
        n=out_size, k=size, rows=rows, cublas_us=cublas, best_us=best_us, floor_us=floor, tile=best, failed=failed
    )


def _parts(out_size: int, size: int) -> dict[str, bool]:
    """What stands around a product where it is used: a norm before it, a gate or a residual behind it."""
    normed = (out_size, size) in NORMED
    return {"HAS_NORM": normed, "GATED": (out_size, size) in GATED, "HAS_RESIDUAL": not normed and out_size < 100_000}


def measure_rows(out_size: int, size: int, rows: int) -> dict:
    """`gemv` with what stands around the product; beside it cuBLAS's product alone."""
    bf16, parts = torch.bfloat16, _parts(out_size, size)
    copies = max(2, -(-L2_BYTES // (out_size * size * 2)))
    weights = [torch.randn(out_size, size, device="cuda", dtype=bf16) for _ in range(min(copies, 64))]
    x, gain = torch.randn(rows, size, device="cuda", dtype=bf16), torch.rand(size, device="cuda", dtype=bf16)
    residual = torch.randn(rows, out_size, device="cuda", dtype=bf16)
    given = (gain if parts["HAS_NORM"] else None, 1e-6, residual if parts["HAS_RESIDUAL"] else None, parts["GATED"])

    def run(weight: torch.Tensor, tile: GemvTile) -> torch.Tensor:
        return gemv(x, weight, None, tile, *given)

    wide = reference.rms_norm(x.float(), gain.float(), 1e-6) if parts["HAS_NORM"] else x.float()
    expected = functional.linear(wide, weights[0].float())
    expected = reference.silu_mul(expected) if parts["GATED"] else expected
    expected = expected + residual.float() if parts["HAS_RESIDUAL"] else expected
    cublas = microseconds(lambda w: functional.linear(x, w), weights)
    timed, failed = [], []
    for tile in row_candidates(out_size, size, rows):
        error = ((run(weights[0], tile).float() - expected).norm() / expected.norm()).item()
        if not error < 1e-2:
            failed.append((tile, error))
            continue
        timed.append((microseconds(lambda w, tile=tile: run(w, tile), weights), tile))
    timed.sort()
    best_us, best = timed[0]
    floor = out_size * size * 2 / BANDWIDTH * 1e6
    return dict(
        n=out_size,
        k=size,
        rows=rows,
        cublas_us=cublas,
        best_us=best_us,
        floor_us=floor,
        tile=best,
        failed=failed,
        all=timed,
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="0.6b,8b")
    p.add_argument("--rows", help=f"comma-separated, of {ROWS}; all where left out")
    p.add_argument("--out", type=Path, default=Path("perf/results"))
    p.add_argument("--seconds", type=float, default=150)
    args = p.parse_args()
    started = time.perf_counter()
    work = [(n, k, rows) for model in args.model.split(",") for rows in ROWS for n, k in SHAPES[model]]
    if args.rows:
        work = [(n, k, rows) for n, k, rows in work if rows in map(int, args.rows.split(","))]
    jobs = {
        (rows, n, k, tile)
        for n, k, rows in work
        for tile in (row_candidates(n, k, rows) if rows <= MAX_SINGLE_ROWS else candidates(n, k, max(16, rows)))
    }
    with concurrent.futures.ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_ahead, sorted(jobs), chunksize=4))
    print(f"{len(jobs)} kernels compiled after {time.perf_counter() - started:.0f} s", flush=True)
    print("     n      k rows   floor  cublas    best  tile (us)")
    results = []
    for n, k, rows in work:
        if time.perf_counter() - started > args.seconds:
            print(f"time is over: {len(work) - len(results)} products not measured")
            break
        found = measure_rows(n, k, rows) if rows <= MAX_SINGLE_ROWS else measure(n, k, rows)
        results.append(found)
        print(
            f"{n:6} {k:6} {rows:4} {found['floor_us']:7.2f} {found['cublas_us']:7.2f} {found['best_us']:7.2f}  {found['tile']}",
            flush=True,
        )
        for problem in found["failed"][:2]:
            print("   failed:", *problem)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, results=results)
    (args.out / "tune_linear.json").write_text(json.dumps(facts, indent=1, default=str))
    tables: dict = {"TABLE": {}, "GEMV_TABLE": {}}
    for found in results:
        single = found["rows"] <= MAX_SINGLE_ROWS
        wins = single or found["best_us"] < 0.98 * found["cublas_us"]
        table = tables["GEMV_TABLE" if single else "TABLE"]
        table.setdefault((found["n"], found["k"]), {})[found["rows"]] = found["tile"] if wins else None
    for name, table in tables.items():
        print(name, "=", table)


if __name__ == "__main__":
    main()
