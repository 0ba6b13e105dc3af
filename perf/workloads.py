"""Seeded work for offline runs: prompts of random ids and exact output lengths, under the names of usual cases.

`of_peer` takes the names that a peer's own files have, those of long prompts too, from there. Knows no engine.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from pagegraph.runtime.bench.work import draw_ids

# case: requests, prompt tokens, output tokens, shared prefix tokens, repeats; a pair is a log-normal (mean, deviation)
CASES: dict[str, tuple] = {
    "throughput": (1000, 128, 256, 0, 1),
    "sharegpt": (1000, (220, 200), (190, 170), 0, 1),
    "latency": (1, 128, 256, 0, 3),
    "batch8": (8, 512, 256, 0, 1),
    "batch32": (32, 512, 256, 0, 1),
    "prefill": (64, 4096, 1, 0, 1),
    "prefix": (256, 600, 16, 500, 1),
}
FIXED_SIZE = ("latency", "batch8", "batch32")  # the number of requests is the case: scale leaves it
LONG = ("prefill_1x100k", "prefill_8x32k", "decode_8x32k", "conversations", "mixed")  # of a peer's file, in this order
Round = tuple[list[list[int]], list[int]]  # prompts handed over at once, their output lengths


@dataclass(frozen=True)
class Work:
    """Requests of one case, those of a round when the round before has ended; others to warm up on; how often to time it."""

    rounds: list[Round]
    warm: list[Round]
    repeat: int = 1

    @property
    def requests(self) -> int:
        return sum(len(prompts) for prompts, _ in self.rounds)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompts, _ in self.rounds for prompt in prompts)

    @property
    def output_tokens(self) -> int:
        return sum(sum(lengths) for _, lengths in self.rounds)


Maker = Callable[[str, int, float], Work]  # (case, vocab_size, scale)


def make(case: str, vocab_size: int, scale: float = 1.0) -> Work:
    """The same arguments give the same work."""
    requests, prompt, output, shared, repeat = CASES[case]
    if case not in FIXED_SIZE:
        requests = max(1, round(requests * scale))

    def draw(seed: int, count: int) -> Round:
        rng = np.random.default_rng([seed, zlib.crc32(case.encode())])
        (prefix,) = draw_ids(rng, [shared], vocab_size)
        own = draw_ids(rng, _sizes(rng, prompt, count) - shared, vocab_size)
        return [prefix + ids for ids in own], _sizes(rng, output, count).tolist()

    warm_prompts, warm_lengths = draw(1, min(requests, 256))
    return Work([draw(0, requests)], [(warm_prompts, [min(n, 16) for n in warm_lengths])], repeat)


def of_peer(folder: Path) -> Maker:
    """The maker that wraps `make` of `workloads.py` and `jobs` of `workloads_more.py` in a peer's folder.

    A case that the former's CASES do not name is this file's.
    """
    usual, more = _module(folder / "workloads.py"), _module(folder / "workloads_more.py")

    def peer_make(case: str, vocab_size: int, scale: float = 1.0) -> Work:
        if case in LONG:
            return Work(more.jobs(case, vocab_size), more.warm(case, vocab_size))
        if case not in usual.CASES:
            return make(case, vocab_size, scale)
        work = usual.make(case, vocab_size, 0, scale)
        warm = work["warm"]
        return Work([(work["prompts"], work["out_lens"])], [(warm["prompts"], warm["out_lens"])], work["repeat"])

    return peer_make


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sizes(rng: np.random.Generator, size: int | tuple[int, int], count: int) -> np.ndarray:
    if isinstance(size, int):
        return np.full(count, size)
    mean, deviation = size
    variance = np.log1p((deviation / mean) ** 2)
    return rng.lognormal(np.log(mean) - variance / 2, variance**0.5, count).round().clip(4, 1024).astype(int)


def distinct(outputs: Sequence[Sequence[int]]) -> float:
    """How many different tokens sequences that run together have at a position, as a share of them, on average.

    Random weights may lead all into the same tokens, and so to the same experts, which are then read for all of them at once.
    """
    together = [[one[at] for one in outputs if at < len(one)] for at in range(max(map(len, outputs), default=0))]
    return sum(len(set(tokens)) / len(tokens) for tokens in together) / max(1, len(together))
