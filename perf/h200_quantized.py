"""Quantised products, whole decode steps and an FP8 cache on one CUDA machine, each against bfloat16 and its floor.

Three parts: every way to compute each matrix of a model by rows, with the entries for `kernels.quant_tiles.TABLE` that
follow; decode steps of a built model by method; decode steps at long context by type of the cache. Knows the shapes of the
reference models; knows no jobs.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from compiler import build as builder
from compiler.quant_formats import ONLINE_GROUP
from floors import BYTES, Ceilings, Shape
from h200_offline import ceilings_of, config_of, step_of
from h200_report import Report, graph_seconds
from kernels import cuda, reference
from kernels.quant_tiles import Choice, Kind, tile_by_rule
from kernels.skinny_tiles import Tile

ROWS = (1, 8, 32, 64, 128, 256)
GROUP = 128  # of the codes of 4 bits that are measured, as most checkpoints have
CODE_BYTES: dict[Kind, float] = {"fp8": 1, "int4": 0.5 + 4 / GROUP, "int8": 1}  # an element, with its scale and shift
METHOD_BYTES = {None: BYTES, "fp8": 1, "int8": 1, "int4": 0.5 + 4 / ONLINE_GROUP}
HEAD_BYTES = {None: BYTES, "fp8": BYTES, "int8": 1, "int4": 1}
ROTATED = 192 << 20  # bytes that weights rotate through, more than the L2 holds
TOLERANCE = {"tile": 1e-2, "plain": 1e-2, "scaled": 8e-2}  # relative; the FP8 product rounds rows to e4m3


def quantized(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Products of each model's matrices, kinds of codes one after the other."""
    ceilings = ceilings_of(report, args, shared)
    for model in [model for model in args.models if model != "tiny"] or ["8b"]:
        shape = Shape.of(model)
        for kind, (name, (out_size, size)) in itertools.product(CODE_BYTES, shape.matmuls().items()):
            if report.out_of_time((model, name, kind)):
                return
            _products(report, model, name, kind, out_size, size, ceilings)


def quantized_step(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Replayed decode steps, each model in a process of its own: by method at 256 keys, then at 8000 by type of the cache."""
    ceilings = ceilings_of(report, args, shared)
    short, long = [(rows, 256) for rows in ROWS], [(8, 8000), (32, 8000)]
    runs = [
        (None, "auto", short + long), (None, "fp8", long), ("fp8", "auto", short), ("fp8", "fp8", long), ("int4", "auto", short),
        ("int8", "auto", short),
    ]  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    for model, (method, cache, cases) in itertools.product([one for one in args.models if one != "tiny"] or ["8b"], runs):
        if report.out_of_time((model, method, cache)):
            return
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            taken = process.submit(steps, args, model, method, cache, cases).result()
        for (rows, keys), seconds in zip(cases, taken):
            floor = step_floor(Shape.of(model), method, cache, rows, keys, ceilings)
            report.row(
                model=model, method=method or "bf16", cache=cache, rows=rows, keys=keys, ms=seconds * 1e3, floor_ms=floor * 1e3,
                ratio=seconds / floor,
            )  # fmt: skip


def steps(args: argparse.Namespace, model: str, method: str | None, cache: str, cases: list[tuple[int, int]]) -> list[float]:
    """Seconds of a replayed step of (rows, keys of each); a pool of as many pages as the largest needs."""
    from h200_engine import _replayed

    pages = max(rows * -(-keys // 16) for rows, keys in cases) + 600  # and those of one longest sequence
    config = config_of(args, model, quantization=method, kv_cache_dtype=cache, num_blocks=pages)
    built = builder.ready(config, progress=False)
    for cache_of_layer in (*built.step.state.key_caches, *built.step.state.value_caches):
        # Random values in every page: zeros run faster than what a model writes.
        cache_of_layer.copy_(torch.randn(cache_of_layer.shape, dtype=torch.bfloat16, device=cache_of_layer.device))
    sizes = dict(vocab_size=built.vocab_size, num_blocks=built.num_blocks, block_size=config.block_size)
    return [_replayed(built, step_of(np.random.default_rng(rows), np.ones(rows), np.full(rows, keys), **sizes)) for rows, keys in cases]


def step_floor(shape: Shape, method: str | None, cache: str, rows: int, keys: int, ceilings: Ceilings) -> float:
    """Seconds: the weights as they are stored (fp8 leaves the head alone) or their products in bfloat16, then the pages once."""
    head = shape.vocab * shape.hidden
    weights = shape.layer_weights * METHOD_BYTES[method] + head * HEAD_BYTES[method]
    flops = 2 * rows * (shape.layer_weights + head)
    pages = rows * keys * shape.kv_bytes * (0.5 if cache == "fp8" else 1)
    return max(weights / ceilings.bandwidth, flops / ceilings.flops) + pages / ceilings.bandwidth


def _weight(kind: Kind, out_size: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
    weight = torch.randn(out_size, size, device="cuda", dtype=torch.bfloat16) * 0.02
    if kind == "int4":
        codes, scale, shift = reference.quantize_groups(weight, GROUP)
        return reference.pack_nibbles(codes), scale.bfloat16(), shift.bfloat16(), GROUP
    codes, scale = reference.quantize_rows(weight, torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    return codes, scale, None, size


def _choices(kind: Kind, rows: int, out_size: int, size: int, group: int) -> Iterator[Choice]:
    yield Choice("plain")
    if kind == "fp8":
        yield Choice("scaled")
    yield Choice("tile", tile_by_rule(rows, out_size, size, group))
    if rows > 64:
        yield Choice("tile", Tile(64, 128, 1, 4, 3))
        return
    # Few, because each is compiled: enough programs to fill the device, no more than four waves of them.
    for block_n, split in itertools.product((32, 64), (1, 2, 4, 8)):
        programs = -(-out_size // block_n) * split
        if size % (split * 128) == 0 and 128 <= programs and (split == 1 or programs <= 1056):
            yield Choice("tile", Tile(block_n, 128, split, 4, 4))


def _products(report: Report, model: str, name: str, kind: Kind, out_size: int, size: int, ceilings: Ceilings) -> None:
    """One line a matrix and kind: by rows, bfloat16 / best way in us, ratio to the floor; then the table's entry."""
    codes, scale, shift, group = _weight(kind, out_size, size)
    whole = reference.dequantize(codes, scale, shift, group)
    plain = [whole.bfloat16() for _ in range(max(1, min(16, ROTATED // (out_size * size * BYTES))))]
    copies = [codes.clone() for _ in range(max(1, min(32, int(ROTATED / (out_size * size * CODE_BYTES[kind])))))]
    line, entry = [], {}
    for rows in ROWS:
        x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
        expected = F.linear(x.float(), whole)
        unquantised = _seconds([lambda w=w: F.linear(x, w) for w in plain])
        best, seconds = None, float("inf")
        for choice in dict.fromkeys(_choices(kind, rows, out_size, size, group)):
            def run(of: torch.Tensor, choice: Choice = choice) -> torch.Tensor:
                return cuda.quant_linear_by(choice, x, of, scale, shift, None, group)

            try:
                error = ((run(codes).float() - expected).norm() / expected.norm()).item()
                if not error < TOLERANCE[choice.way]:
                    report.failure(f"{model} {name} {kind} {rows} {choice}: relative error {error:.3g}")
                    continue
                took = _seconds([lambda of=of: run(of) for of in copies])
            except Exception as problem:
                report.failure(f"{model} {name} {kind} {rows} {choice}: {problem!r}"[:300])
                continue
            if took < seconds:
                best, seconds = choice, took
        moved = out_size * size * CODE_BYTES[kind] + rows * (size + out_size) * BYTES
        floor = max(moved / ceilings.bandwidth, 2 * rows * out_size * size / ceilings.flops)
        report.row(
            show=False, kernel="quant_linear", model=model, matrix=name, kind=kind, rows=rows, bf16_us=unquantised * 1e6,
            us=seconds * 1e6, gain=unquantised / seconds, ratio=seconds / floor, choice=repr(best),
        )  # fmt: skip
        if best is not None:
            entry[rows] = best
        line.append(f"{unquantised * 1e6:.1f}/{seconds * 1e6:.1f} x{seconds / floor:.2f}")
    print(f"{name:>8} {kind:>5}  {'  '.join(line)}")
    print(f'    ("{kind}", {out_size}, {size}): {entry},', flush=True)


def _seconds(calls: list[Callable[[], object]]) -> float:
    return graph_seconds(calls * max(1, 16 // len(calls)), 0.02)
