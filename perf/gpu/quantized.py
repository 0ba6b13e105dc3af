"""Quantised products, whole decode steps and an FP8 cache on one CUDA machine, each against bfloat16 and its floor.

Two sections: every way to compute each matrix of a model by rows, with the entries for `kernels.quant.tiles.TABLE` that
follow and what is slower than bfloat16; and decode steps of built models by method and by type of the cache. Knows the
shapes of the reference models; knows no jobs. On a CPU both run their control flow alone.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch.nn import functional

from pagegraph.compiler.build import build_model
from pagegraph.compiler.inductor.cache import cache_folder, use_cache
from pagegraph.kernels.linear import cuda as linear_cuda
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.quant import cuda as quant_cuda
from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.tiles import (
    MEMORY_BOUND_ROWS,
    SINGLE_ROWS,
    Choice,
    by_gemm_8bit,
    by_gemv,
    gemm_16bit_tile_by_rule,
    has_gemm_8bit,
)
from pagegraph.kernels.quant.weight import Kind, QuantWeight
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf.floors import BYTES, Ceilings, Shape
from perf.gpu.offline import ceilings_of, config_of, step_of
from perf.gpu.report import Report, graph_seconds

ROWS = (2, 8, 32, 64, 128, 256, 1024)  # of a product; a step of one sequence is padded to two
TABLE_GROUP = 128  # of int4 in `kernels.quant.tiles.TABLE`
ROTATED = 192 << 20  # bytes that weights rotate through, more than the L2 holds
# Relative; the last two quantise rows to 8 bits.
TOLERANCE = {"gemv": 1e-2, "gemm_16bit": 1e-2, "dequantize": 1e-2, "gemm_8bit": 4e-2, "scaled_mm": 8e-2}
ALIKE = ((128, 256, 1024), (64,), (32,), (2, 8))  # rows that share most kernels: compiled by one process
FEW_SIZES = (  # of a product of few rows, as `QuantGemvTile`
    (1, 8, 1, 6), (1, 8, 1, 8), (1, 8, 2, 4), (1, 4, 4, 3), (1, 4, 2, 6), (1, 4, 1, 6), (2, 4, 1, 6), (2, 4, 2, 4), (2, 8, 1, 6), (4, 4, 1, 4), (4, 2, 2, 4), (2, 2, 2, 6),
)  # fmt: skip
GEMM_8BIT_SIZES = (
    (64, 4, 4, 64),
    (64, 4, 3, 128),
    (64, 4, 4, 128),
    (128, 4, 3, 64),
    (128, 8, 4, 128),
)  # weight rows of a tile of 8 bits on both sides, warps, stages, rows of x
WORKERS = 12
COMPILING = 0.5  # share of a section's time for compiling ahead

Case = tuple[int, int]  # sequences, keys of each
SHORT, LONG = tuple((rows, 256) for rows in (1, 8, 32, 64, 128, 256)), ((8, 8000), (32, 8000))
TINY_SHORT, TINY_LONG = ((1, 64), (8, 64)), ((8, 96),)
# (method, cache, whether at few keys, whether at many): of a row together, if their weights and blocks fit.
RUNS = (
    ((None, "auto", True, True), (None, "fp8", False, True), ("fp8", "auto", True, False)),
    (("int4", "auto", True, False), ("int8", "auto", True, False)),
)
TOGETHER = 130 << 30  # bytes of a device that hold the first row of them for the 8B
START_SECONDS = 200  # of a model's build


@dataclass(frozen=True)
class Product:
    """A model's matrix [out_size, size] of a kind."""

    model: str
    matrix: str
    kind: Kind
    out_size: int
    size: int
    group: int  # columns that share a scale

    @property
    def bytes(self) -> float:
        """Of the values, those of 4 bits with their scales and zeros, as the floor counts them."""
        return self.out_size * self.size * (0.5 + 4 / self.group if self.kind == "int4" else 1)

    def choices(self, rows: int) -> list[Choice]:
        return list(dict.fromkeys(_choices(self, rows)))


def quantized(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Products of each model's matrices, kinds one after the other: by rows, the best way against bfloat16."""
    ceilings = ceilings_of(report, args, shared)
    products = [
        Product(model, matrix, kind, out_size, size, args.group if kind == "int4" else size)
        for model, kind in itertools.product(
            _models(args), [args.quantization] if args.quantization else ("fp8", "int4", "int8")
        )
        for matrix, (out_size, size) in Shape.of(model).matmuls().items()
    ]
    _compile_ahead(report, args, products)
    rows: list[dict] = []
    for at, product in enumerate(products):
        if report.time_is_over():
            report.fact(unmeasured=[f"{one.model} {one.kind} {one.matrix}" for one in products[at:]])
            break
        rows += _measured(report, args, product, ceilings)
    _gains(rows)


def _models(args: argparse.Namespace) -> list[str]:
    return [one for one in args.models if one != "tiny"] or (["8b"] if args.device == "cuda" else ["tiny"])


def _choices(product: Product, rows: int) -> Iterator[Choice]:
    """Few, because each is compiled: enough programs to fill the device, no more than four waves of them.

    More rows of the weight to a tile read x less often, which counts from 32 rows on.
    """
    if rows <= SINGLE_ROWS:
        yield from (by_gemv(*sizes) for sizes in FEW_SIZES)
        yield Choice("gemm_16bit", gemm_16bit_tile_by_rule(rows, product.out_size, product.size))
        return
    if rows > MEMORY_BOUND_ROWS // 2:
        yield Choice("dequantize")
    if product.kind == "fp8":
        yield Choice("scaled_mm")
    if rows > MEMORY_BOUND_ROWS and has_gemm_8bit(product.kind, product.group, product.size, product.kind == "int4"):
        for block_n, warps, stages, block_t in GEMM_8BIT_SIZES:
            for split in _splits(product, rows, block_n, block_t):
                yield by_gemm_8bit(block_n, split, warps, stages, block_t)
    if product.kind != "fp8" or rows <= MEMORY_BOUND_ROWS:
        yield Choice("gemm_16bit", gemm_16bit_tile_by_rule(rows, product.out_size, product.size))
    for block_n, block_k, warps, stages, block_t in _sizes(product.kind, rows):
        for split in _splits(product, rows, block_n, block_t):
            yield Choice("gemm_16bit", Tile(block_n, block_k, split, warps, stages, block_t))


def _splits(product: Product, rows: int, block_n: int, block_t: int) -> Iterator[int]:
    """That divide the columns and leave programs for the device, but not many."""
    whole = -(-product.out_size // block_n) * -(-rows // block_t)
    most = 1056 if rows <= MEMORY_BOUND_ROWS else 528
    for split in (1, 2, 4, 8):
        if product.size % (split * 128) == 0 and 100 <= whole * split and (split == 1 or whole * split <= most):
            yield split


def _sizes(kind: Kind, rows: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """Weight rows and columns of a step, warps, stages, rows of x: none spills."""
    if rows <= 16:
        return (64, 128, 4, 4, 64), (64, 128, 4, 6, 64), (128, 128, 4, 4, 64)
    if rows <= MEMORY_BOUND_ROWS:
        return (64, 128, 4, 4, 64), (128, 128, 4, 4, 64), (256, 128, 8, 3, 64)
    if kind == "fp8":
        return ()
    many = (128, 128, 8, 3, 128), (128, 64, 8, 4, 128), (128, 64, 8, 3, 128), (64, 64, 4, 4, 128), (64, 128, 4, 4, 64)
    return (*many, (128, 64, 8, 3, 256)) if rows > 128 else many


def _lag(choice: Choice, rows: int) -> float:
    """What a way that is no kernel of ours is to be slower by: in a step of few rows it breaks the chain of dependent launches."""
    return 1.0 if choice.way in ("gemv", "gemm_16bit", "gemm_8bit") or rows > 16 else 1.05


def _compile_ahead(report: Report, args: argparse.Namespace, products: list[Product]) -> None:
    """Every kernel of every choice into Triton's cache, by several processes: nothing is compiled between timings."""
    start = time.perf_counter()
    use_cache(cache_folder(None))
    limit = report.seconds * COMPILING
    jobs = [(args.device, product, rows) for rows in ALIKE for product in products]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(WORKERS, max(1, (os.cpu_count() or 1) - 2)), mp_context=spawn) as pool:
        futures = [pool.submit(compile_product, *job) for job in jobs]
        done, late = wait(futures, timeout=limit)
        pool.shutdown(wait=True, cancel_futures=True)
    failed = [
        text
        for one in done
        if not one.cancelled()
        for text in (one.result() if one.exception() is None else [repr(one.exception())])
    ]
    report.fact(compile_s=time.perf_counter() - start, compiled=len(done), not_compiled=len(late), failed=len(failed))
    for text in dict.fromkeys(failed):
        print(f"not compiled: {text}", flush=True)


def compile_product(device: str, product: Product, counts: tuple[int, ...]) -> list[str]:
    """Run each choice of a product of so many rows once on whatever memory holds; returns what went wrong."""
    if device != "cuda":
        return []
    wrong = []
    weight = _weight(product, device, random=False)
    for rows, choice in ((count, choice) for count in counts for choice in product.choices(count)):
        x = torch.zeros(rows, product.size, dtype=torch.bfloat16, device=device)
        try:
            _product(product, choice, x, *weight)
        except Exception as problem:
            wrong.append(f"{product} {rows} {choice}: {problem!r}"[:300])
    torch.cuda.synchronize()
    return wrong


def _product(
    product: Product,
    choice: Choice,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
) -> torch.Tensor:
    """x [T, size] times the weight of `_weight` by the given way, on CUDA."""
    return quant_cuda.repacked_linear_by(
        choice, x, QuantWeight(qweight, scale, zero, None, product.group, product.out_size)
    )


def _weight(
    product: Product, device: str, random: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(qweight, scale, zero) as a device holds them."""
    out_size, size, group = product.out_size, product.size, product.group
    if not random:
        return _zeros(product, device)
    weight = torch.empty(out_size, size, device=device, dtype=torch.bfloat16).normal_(std=0.02)
    if product.kind == "fp8":
        qweight, scale = reference.quantize_rows(weight, torch.float8_e4m3fn)
        return reference.exchanged_columns(qweight), scale, None
    if product.kind == "int8":
        qweight, scale = reference.quantize_rows(weight, torch.int8)
        return reference.repack(qweight, 8), reference.repack_scales(scale, group, size), None
    qweight, *pairs = reference.quantize_groups(weight, group)
    return reference.repack(qweight, 4), *(reference.repack_scales(one.bfloat16(), group, size) for one in pairs)


def _zeros(product: Product, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `_weight`, without the memory that quantising takes."""
    out_size, size = product.out_size, product.size
    blocks = -(-out_size // reference.REPACK_BLOCK), size // reference.REPACK_BLOCK
    pairs = (
        blocks[0],
        size // max(product.group, reference.REPACK_BLOCK),
        32,
        2 * max(1, reference.REPACK_BLOCK // product.group),
    )
    scale = torch.zeros(pairs, dtype=torch.bfloat16 if product.kind == "int4" else torch.float32, device=device)
    if product.kind == "fp8":
        qweight = torch.zeros(out_size, size, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return qweight, torch.zeros(out_size, 1, device=device), None
    if product.kind == "int8":
        return torch.zeros(*blocks, 256, 16, dtype=torch.int8, device=device), scale, None
    return torch.zeros(*blocks, 128, 16, dtype=torch.uint8, device=device), scale, scale


def _dequantized(
    product: Product, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """Float32 [out_size, size]."""
    if product.kind == "fp8":
        qweight = reference.restored_columns(qweight, product.size)
    else:
        qweight = reference.from_repacked(qweight, product.out_size, product.size)
        groups = product.size // product.group
        scale, zero = (
            None if one is None else reference.from_repacked_scales(one, product.out_size, groups)
            for one in (scale, zero)
        )
    return reference.dequantize(qweight, scale, zero, product.group)


def _measured(report: Report, args: argparse.Namespace, product: Product, ceilings: Ceilings) -> list[dict]:
    """One line: by rows, bfloat16 / best way in us, ratio to the floor; then the table's entry."""
    out_size, size, kind = product.out_size, product.size, product.kind
    qweight, scale, zero = _weight(product, args.device)
    whole = _dequantized(product, qweight, scale, zero)
    plain = [whole.bfloat16() for _ in range(max(1, min(16, ROTATED // (out_size * size * BYTES))))]
    copies = [qweight.clone() for _ in range(max(1, min(32, int(ROTATED / product.bytes))))]
    line, entry, found = [], {}, []
    for rows in ROWS:
        x = torch.randn(rows, size, device=args.device, dtype=torch.bfloat16)
        expected = x.float() @ whole.t()
        linear = linear_cuda.linear if args.device == "cuda" else functional.linear
        unquantised = _seconds(args, [lambda w=w: linear(x, w, None) for w in plain])
        took: dict[Choice, float] = {}
        for choice in product.choices(rows):

            def run(of: torch.Tensor, choice: Choice = choice) -> torch.Tensor:
                if args.device == "cpu":
                    return functional.linear(x, whole.bfloat16())
                return _product(product, choice, x, of, scale, zero)

            try:
                error = ((run(qweight).float() - expected).norm() / expected.norm()).item()
                if not error < TOLERANCE[choice.way]:
                    report.failure(f"{product} {rows} {choice}: relative error {error:.3g}")
                    continue
                took[choice] = _seconds(args, [lambda of=of: run(of) for of in copies])
            except Exception as problem:
                report.failure(f"{product} {rows} {choice}: {problem!r}"[:300])
        if not took:
            continue
        best = entry[rows] = min(took, key=lambda choice: took[choice] * _lag(choice, rows))
        moved = product.bytes + rows * (size + out_size) * BYTES
        floor = max(moved / ceilings.bandwidth, 2 * rows * out_size * size / ceilings.flops)
        row = dict(
            kernel="quant_linear", model=product.model, matrix=product.matrix, kind=kind, rows=rows, bf16_us=unquantised * 1e6,
            us=took[best] * 1e6, gain=unquantised / took[best], ratio=took[best] / floor, way=best.way, choice=repr(best),
        )  # fmt: skip
        report.row(
            show=False, **row, all_us={repr(choice): round(seconds * 1e6, 2) for choice, seconds in took.items()}
        )
        found.append(row)
        line.append(f"{row['bf16_us']:.1f}/{row['us']:.1f} x{row['ratio']:.2f}")
    print(f"{product.matrix:>8} {kind:>5}  {'  '.join(line)}")
    if kind != "int4" or product.group == TABLE_GROUP:
        print(
            f'    ("{kind}", {out_size}, {size}): {{{", ".join(f"{rows}: {_written(choice)}" for rows, choice in entry.items())}}},',
            flush=True,
        )
    return found


def _written(choice: Choice) -> str:
    """As the table has it."""
    if choice.way == "gemm_8bit":
        block_n, _, *sizes = choice.tile
        return f"by_gemm_8bit({', '.join(map(str, (block_n, *sizes)))})"
    if choice.way in ("gemv", "gemm_16bit"):
        return f"by_{choice.way}({', '.join(map(str, choice.tile))})"
    return choice.way.upper()


def _seconds(args: argparse.Namespace, calls: list[Callable[[], object]]) -> float:
    if args.device == "cuda":
        return graph_seconds(calls * max(1, 16 // len(calls)), 0.02)
    start = time.perf_counter()
    calls[0]()
    return time.perf_counter() - start


def _gains(rows: list[dict]) -> None:
    """Times as fast as bfloat16 by matrix and rows, all products of a step together, and where the best way is slower."""
    print("\ntimes as fast as bfloat16" + "".join(f"{f'{count} rows':>18}" for count in ROWS))
    by_cell = {(row["model"], row["kind"], row["matrix"], row["rows"]): row for row in rows}
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        shape, totals = Shape.of(model), {}
        for matrix in shape.matmuls():
            cells = [by_cell.get((model, kind, matrix, count)) for count in ROWS]
            print(f"{model:>6} {kind:>5} {matrix:>10}  " + "".join(f"{_gain(cell):>18}" for cell in cells))
            for count, cell in zip(ROWS, cells):
                times = 1 if matrix == "lm_head" else shape.layers
                add = (times * cell["bf16_us"], times * cell["us"]) if cell else (float("nan"),) * 2
                totals[count] = tuple(map(sum, zip(totals.get(count, (0.0, 0.0)), add)))
        print(
            f"{model:>6} {kind:>5} {'step, ms':>10}  "
            + "".join(f"{f'{a / 1e3:.2f}/{b / 1e3:.2f} {a / b:.2f}':>18}" for a, b in totals.values())
        )
    slower = [row for row in rows if row["gain"] < 1]
    print(f"slower than bfloat16: {len(slower)} of {len(rows)}")
    for row in slower:
        print(f"  {row['model']} {row['kind']} {row['matrix']} {row['rows']} rows: {_gain(row)}", flush=True)


def _gain(row: dict | None) -> str:
    return f"{row['gain']:.2f} {row['way']}" if row else ""


def quantized_step(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Replayed decode steps, each model in a process of its own: by method at few keys, by type of the cache at many.

    Several are built at a time and wait for each other, so that nothing else runs on the device while one is timed.
    """
    ceilings = ceilings_of(report, args, shared)
    room = torch.cuda.mem_get_info()[1] if args.device == "cuda" else 0
    batches = RUNS if room > TOGETHER else tuple((run,) for runs in RUNS for run in runs)
    for model in _models(args):
        found: dict[tuple, float] = {}
        for at, batch in enumerate(batches):
            batch = [run for run in batch if args.quantization in (None, run[0]) or run[:2] == (None, "auto")]
            if not batch:
                continue
            if report.time_is_over():
                report.fact(unmeasured=[f"{model} {run[:2]}" for rest in batches[at:] for run in rest])
                break
            _together(report, args, model, batch, ceilings, found)
        _by_method(model, found)


def _together(
    report: Report,
    args: argparse.Namespace,
    model: str,
    runs: tuple[tuple, ...],
    ceilings: Ceilings,
    found: dict[tuple, float],
) -> None:
    """Build the models of `runs` side by side, then time one after the other; seconds of each step into `found`."""
    spawn = multiprocessing.get_context("spawn")
    started = []
    for method, cache, at_few, at_many in runs:
        short, long = (TINY_SHORT, TINY_LONG) if args.tiny else (SHORT, LONG)
        cases = (short if at_few else ()) + (long if at_many else ())
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=steps, args=(theirs, args, model, method, cache, cases))
        process.start()
        theirs.close()
        started.append((process, ours, method, cache, cases))
    end = time.perf_counter() + START_SECONDS
    waiting = []
    for process, pipe, method, cache, cases in started:
        built = _received(pipe, end - time.perf_counter())
        if isinstance(built, str):
            report.failure(f"{model} {method} {cache}: {built}")
            process.kill()
        else:
            report.fact(**{f"{method or 'bf16'}_{cache}_s": built})
            waiting.append((pipe, method, cache, cases))
    for pipe, method, cache, cases in waiting:
        pipe.send("go")
        for rows, keys in cases:
            seconds = _received(pipe, 60)
            if isinstance(seconds, str):
                report.failure(f"{model} {method} {cache}: {seconds}")
                break
            lengths, start = np.full(rows, keys), np.arange(rows + 1)
            floor = Shape.of(model).step_floor(ceilings, start, lengths, method, cache)
            found[method, cache, rows, keys] = seconds
            report.row(
                model=model, method=method or "bf16", cache=cache, rows=rows, keys=keys, ms=seconds * 1e3, floor_ms=floor * 1e3,
                ratio=seconds / floor, gain=found.get((None, "auto", rows, keys), float("nan")) / seconds,
            )  # fmt: skip
    for process, pipe, *_ in started:
        pipe.close()
        process.join(20)
        process.kill()


def _received(pipe: Connection, seconds: float) -> object:
    """What a process sends; a text where it has failed."""
    try:
        return pipe.recv() if pipe.poll(max(seconds, 0)) else f"nothing came in {seconds:.0f} s"
    except EOFError:
        return "its process ended"


def steps(
    pipe: Connection, args: argparse.Namespace, model: str, method: str | None, cache: str, cases: tuple[Case, ...]
) -> None:
    """Build, say the seconds by stage, wait for a word, then send the seconds of a replayed step of each case."""
    from perf.gpu.engine_steps import _replayed

    try:
        num_blocks = sum((max(rows * -(-keys // 16) for rows, keys in cases), -(-8192 // 16), 8))
        config = config_of(args, model, quantization=method, kv_cache_dtype=cache, num_blocks=num_blocks)
        built = build_model(compiler_options(config), progress=False)
        for pool in (*built.step.state.caches.key_caches, *built.step.state.caches.value_caches):
            # Random values in every block: zeros run faster than what a model writes.
            pool.copy_(torch.randn(pool.shape, dtype=torch.bfloat16, device=pool.device))
        if config.compile:
            with built.timings.stage("compile"):
                built.compile()
        if built.device.type == "cuda":
            with built.timings.stage("graphs"):
                buckets = {built.step.runner.capture_sizes.bucket(rows, rows) for rows, _ in cases}
                built.step.runner.capture_graphs(sorted(buckets), progress=False)
            torch.cuda.empty_cache()
        pipe.send({name: round(seconds, 1) for name, seconds in built.timings.seconds.items()})
        pipe.recv()
        sizes = dict(vocab_size=built.vocab_size, num_blocks=built.num_blocks, block_size=config.block_size)
        for rows, keys in cases:
            pipe.send(
                _replayed(built, step_of(np.random.default_rng(rows), np.ones(rows), np.full(rows, keys), **sizes))
            )
    except Exception:
        pipe.send(traceback.format_exc()[-1500:])


def _by_method(model: str, found: dict[tuple, float]) -> None:
    """A column a method: ms, times as fast as bfloat16."""
    columns = list(dict.fromkeys((method, cache) for method, cache, _, _ in found))
    names = [f"{method or 'bf16'}, cache {cache}" for method, cache in columns]
    print(
        f"\n{model}: ms, times as fast as bfloat16\n{'rows':>6} {'keys':>6}" + "".join(f"{name:>24}" for name in names)
    )
    for rows, keys in dict.fromkeys((rows, keys) for _, _, rows, keys in found):
        whole = found.get((None, "auto", rows, keys), float("nan"))
        taken = [found.get((*column, rows, keys)) for column in columns]
        print(
            f"{rows:>6} {keys:>6}"
            + "".join(f"{f'{one * 1e3:.3f}  {whole / one:.2f}' if one else '':>24}" for one in taken),
            flush=True,
        )
