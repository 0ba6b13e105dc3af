"""The ops on the device against their references: attention, KV writes and Gumbel-max over a grid of shapes.

Steps are random and ragged; unused slots, padding rows and every output hold NaN beforehand. Each combination of
sizes compiles kernels of its own, so worker processes share the grid, and it is taken in a random order until the
time is over. Knows no model.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from pagegraph.kernels import ops  # noqa: F401  ops registers torch.ops.pagegraph
from pagegraph.kernels.attention import reference as attention_reference
from pagegraph.kernels.sampling import reference as sampling_reference
from perf.gpu.report import Report
from tests.kernels.attention.cases import Case, check

FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "window": dict(window=24),
    "softcap": dict(softcap=20.0),
    "sinks": dict(sinks=True),
    "chunk": dict(chunk=32),
    "all": dict(window=100, softcap=30.0, sinks=True, strided=True),
}
FIRST = [  # the shapes of the reference models lead the grid
    dict(head_size=128, heads=32, kv_heads=8, block_size=16, dtype=torch.bfloat16),
    dict(head_size=128, heads=16, kv_heads=8, block_size=16, dtype=torch.bfloat16),
    dict(head_size=64, heads=9, kv_heads=3, block_size=16, dtype=torch.float32, strided=True),
    dict(head_size=192, value_size=128, heads=4, kv_heads=4, block_size=16, dtype=torch.bfloat16),
]
VOCABS = (257, 32000, 128256, 151936)
MAX_WORKERS = 8
LOST = ("illegal", "misaligned", "launch failure", "device-side assert")  # errors after which a process has no device
_device_lost = False


@dataclass
class Outcome:
    """What one combination came to: comparisons made, their worst relative error, what went wrong."""

    name: str
    compared: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def kernels(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Failures, a count and the worst relative errors by dtype."""
    tasks = [("gumbel", vocab) for vocab in VOCABS] + [("attention", shape) for shape in _grid(args.tiny)]
    seed = random.SystemRandom().randrange(1 << 30)
    workers = min(MAX_WORKERS, os.cpu_count() or 1, 2 if args.tiny else MAX_WORKERS)
    report.fact(combinations=len(tasks), workers=workers, seed=seed)
    worst: dict[str, float] = {}
    done = compared = failed = 0
    given = iter([(kind, what, seed + index, args.device) for index, (kind, what) in enumerate(tasks)])
    with _workers(workers) as pool:
        running = {pool.submit(_task, one) for one in itertools.islice(given, 2 * workers)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for outcome in (future.result() for future in ended):
                report.row(show=False, **asdict(outcome))
                done, compared = done + 1, compared + outcome.compared
                failed += bool(outcome.failures)
                kind = outcome.name.split()[0]
                worst[kind] = max(worst.get(kind, 0.0), outcome.worst)
                for failure in outcome.failures:
                    report.failure(f"{outcome.name}: {failure}")
            if report.time_is_over():
                given = iter(())  # those that run come to their end
            running |= {pool.submit(_task, one) for one in itertools.islice(given, len(ended))}
    if done < len(tasks):
        report.fact(skipped_for_time=f"{len(tasks) - done} combinations")
    report.row(
        combinations=done,
        comparisons=compared,
        failed=failed,
        **{f"worst_{kind}": error for kind, error in worst.items()},
    )


def _grid(tiny: bool) -> list[dict[str, object]]:
    """Combinations of sizes, types and features; the first fixed, the rest shuffled the same way every time."""
    grid = [
        dict(head_size=size, heads=group * 2, kv_heads=2, block_size=block, dtype=dtype, **FEATURES[feature])
        for size, group, block, dtype, feature in itertools.product(
            (64, 80, 96, 128, 256), (1, 3, 4, 8), (16, 32), (torch.bfloat16, torch.float32), FEATURES
        )
    ]
    random.Random(0).shuffle(grid)
    return (FIRST + grid)[:6] if tiny else FIRST + grid


def _lengths(rng: np.random.Generator) -> Iterator[tuple[str, tuple[tuple[int, int], ...], int, int]]:
    """Random steps: (kind, (rows, keys) of each sequence, padding tokens, padding sequences)."""
    pad = int(rng.integers(1, 8))
    few = tuple((1, int(n)) for n in (1, rng.integers(2, 40), rng.integers(40, 600), rng.integers(1000, 6000)))
    yield "decode", few, pad, pad
    yield "decode", tuple((1, int(n)) for n in rng.integers(1, 300, 120)), pad, pad + 3
    rows = [(int(n), int(n + rng.integers(0, 400))) for n in rng.integers(1, 90, 6)]
    mixed = [*few, *rows, (1, int(rng.integers(1, 900)))]
    rng.shuffle(mixed)
    yield "mixed", tuple((int(a), int(b)) for a, b in mixed), pad, int(rng.integers(0, 5))
    long = int(rng.integers(500, 1200))
    yield "prefill", ((long, long), (2, 2), (int(rng.integers(100, 300)), 900)), pad, 2


def _workers(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def _task(given: tuple[str, object, int, str]) -> Outcome:
    """One combination in a worker; an error is an outcome."""
    global _device_lost
    kind, what, seed, device = given
    if _device_lost:
        with _workers(1) as fresh:
            return fresh.submit(_task, given).result()
    torch.set_num_threads(2)  # many workers
    start = time.perf_counter()
    outcome = _attention(what, seed, device) if kind == "attention" else _gumbel(what, seed, device)
    outcome.seconds = time.perf_counter() - start
    _device_lost = any(word in failure for failure in outcome.failures for word in LOST)
    return outcome


def _attention(shape: dict, seed: int, device: str) -> Outcome:
    name = str(shape["dtype"]).removeprefix("torch.")
    outcome = Outcome(f"{name} {Case(**shape)}")
    for index, (kind, lengths, pad_tokens, pad_seqs) in enumerate(_lengths(np.random.default_rng(seed))):
        case = Case(
            **{**shape, "lengths": lengths, "pad_tokens": pad_tokens, "pad_seqs": pad_seqs, "seed": seed + index}
        )
        try:
            arguments = case.arguments()
            mine, theirs = _on(device, arguments), _on(device, arguments)
            expected = attention_reference.paged_attention(*theirs)
            with _poisoned_memory():
                out = torch.ops.pagegraph.paged_attention(*mine)
            outcome.compared += 1
            live = int(arguments[8][-1])
            error = (out[:live].double() - expected[:live].double()).norm() / expected[:live].double().norm()
            outcome.worst = max(outcome.worst, error.item())
            check(out, mine, expected, theirs)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            outcome.failures.append(
                f"{kind} seed {case.seed}, {len(lengths)} sequences: {type(error).__name__}: {text}"
            )
    return outcome


def _gumbel(vocab: int, seed: int, device: str) -> Outcome:
    """Each id scores as the best of the reference does, up to rounding."""
    outcome = Outcome(f"gumbel vocab {vocab}")
    g = torch.Generator().manual_seed(seed)
    for rows, dtype in ((1, torch.float32), (3, torch.bfloat16), (64, torch.float32)):
        logits = (torch.randn(rows, vocab + 5, generator=g) * 4).to(dtype)[:, :vocab]
        logits[:, ::3] = -torch.inf
        temperature = torch.rand(rows, generator=g) * (torch.arange(rows) % 4 > 0)
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
        positions = torch.randint(0, 100_000, (rows,), generator=g, dtype=torch.int32)
        try:
            expected = sampling_reference.gumbel_argmax(logits, temperature, seeds, positions)
            with _poisoned_memory():
                whole = torch.arange(rows, dtype=torch.int32)
                given = (logits, temperature, seeds, positions, whole, torch.ones_like(whole), torch.zeros_like(whole))
                ids = torch.ops.pagegraph.sample(*_on(device, given)).cpu()
            drawn = (temperature > 0)[:, None]
            scores = logits.float() / torch.where(drawn, temperature[:, None], 1.0)
            scores = torch.where(drawn, scores + sampling_reference.gumbel(seeds, positions, vocab), scores)
            gap = (scores.gather(1, expected[:, None]) - scores.gather(1, ids[:, None])).max().item()
            outcome.compared += 1
            outcome.worst = max(outcome.worst, gap)
            if not gap < 1e-3:
                outcome.failures.append(f"{rows} rows of {dtype}: an id scores {gap:.1e} below the best")
        except Exception as error:
            outcome.failures.append(
                f"{rows} rows of {dtype}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
    return outcome


class _poisoned_memory:
    """Within it `torch.empty` gives NaN (or the largest integer): what an op leaves unwritten shows."""

    def __enter__(self) -> None:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def _on(device: str, arguments: tuple) -> tuple:
    """The arguments copied to the device, strides kept."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device).copy_(a)
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    )
