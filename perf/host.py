"""The engine with its device left out: what the host does in a step, how full its blocks are, whether they come back.

Steps are staged as on CUDA and answered at once with made-up ids. Knows the engine by its public parts; knows no gates.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pagegraph.compiler.build import BuiltModel, Timings
from pagegraph.compiler.step.caches import Caches
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.inputs import Deferred, StepInput, StepOutput
from pagegraph.compiler.step.staging import CudaStaging, Layout
from pagegraph.compiler.step.state import DeviceState
from pagegraph.compiler.step.step import Ticket
from pagegraph.runtime.config import Config
from pagegraph.runtime.scheduler.block_pool import BlockPool
from perf import workloads
from perf.gpu.offline import Offline, random_prompts

VOCAB, MAX_LEN, EOS = 151936, 8192, 151645
PARTS = ("schedule", "pack", "stage", "commit", "turn")


@dataclasses.dataclass(frozen=True)
class HostRun:
    """Requests that all ran to their end."""

    seconds: dict[str, float]  # median by part of a turn in which every sequence decodes, and `rest`
    decode_turns: int  # such turns
    transfers: int  # copies of metadata that a device would have got
    unused: list[float]  # share of the slots of held blocks in which no token is, after each turn
    held_blocks: int  # that somebody holds although no request is left
    preemptions: int

    @property
    def outside_launch(self) -> float:
        """Seconds of a turn that the launch of its step does not take."""
        return self.seconds["turn"] - self.seconds["stage"]


class NoDevice:
    """A step that stages its input and answers with made-up ids at once."""

    compiled = True

    def __init__(self, stage: Callable[[StepInput], object]) -> None:
        self._ids = np.random.default_rng(0).integers(3, VOCAB - 1000, 8192, dtype=np.int32)
        self.stage = stage
        self.counts = StepCounts()

    def use_idle_time(self) -> bool:
        return False

    def launch(self, step: StepInput) -> Ticket:
        self.stage(step)
        ids = self._ids[: step.num_seqs]
        return Ticket(Deferred(lambda: StepOutput(ids)))


class PlainStaging(CudaStaging):
    """Fills metadata buffers as on CUDA, in plain memory, and goes no further."""

    transfers = 0

    def _allocate(self, words: int) -> None:
        self._words = np.empty(words, np.int32)

    def metadata(self, bucket: Bucket) -> None:
        return None

    def _transfer(self, step: StepInput, bucket: Bucket) -> None:
        self.transfers += 1
        self._fill(self._words, Layout.of(bucket), step)


def run(sizes: Sequence[int], lengths: Sequence[int], *, max_num_seqs: int = 0, num_blocks: int = 0) -> HostRun:
    """Random prompts of `sizes` tokens, all at once, each to `lengths` outputs.

    All fit one step and the pool unless `max_num_seqs` or `num_blocks` say less.
    """
    seqs = max_num_seqs or len(sizes)
    budget = 1 << max(15, (sum(sizes) - 1).bit_length())
    config = Config(
        model="none", device="cpu", max_model_len=MAX_LEN, max_num_seqs=seqs, max_num_batched_tokens=budget,
        max_queue=100_000, enable_prefix_caching=True, inter_token_target_ms="none",
    )  # fmt: skip
    block = config.block_size
    num_blocks = num_blocks or 1 + sum(-(-(size + length) // block) + 1 for size, length in zip(sizes, lengths))
    state = DeviceState(
        Caches.none(), block_size=block, max_num_seqs=seqs, max_blocks=512, vocab_size=VOCAB,
        device=torch.device("cpu"),
    )  # fmt: skip
    staging = PlainStaging(state, Bucket(budget, seqs))
    spent: dict[str, list[float]] = {name: [] for name in PARTS}

    def timed(name: str, call: Callable) -> Callable:
        def wrapped(*arguments: object) -> object:
            start = time.perf_counter()
            result = call(*arguments)
            spent[name].append(time.perf_counter() - start)
            return result

        return wrapped

    built = BuiltModel(
        step=NoDevice(timed("stage", lambda step: staging.send(step, Bucket(step.num_tokens, step.num_seqs)))),
        folder=Path("."), device=torch.device("cpu"), dtype=torch.bfloat16, vocab_size=VOCAB, hidden_size=0,
        max_model_len=MAX_LEN, num_blocks=num_blocks, eos_ids=frozenset([EOS]), timings=Timings(),
    )  # fmt: skip
    offline = Offline(config, built)
    engine, unused = offline.engine, []
    scheduler, packer = engine.scheduler, engine._packer
    scheduler.schedule, scheduler.commit = timed("schedule", scheduler.schedule), timed("commit", scheduler.commit)
    packer.pack = timed("pack", packer.pack)
    turn = timed("turn", engine.turn)

    def watched_turn() -> None:
        turn()
        if held := scheduler.batch.num_blocks.sum():
            unused.append(float(1 - scheduler.batch.computed.sum() / (held * block)))

    engine.turn = watched_turn
    done = offline.run(random_prompts(0, list(sizes), VOCAB), list(lengths))
    decodes = sum(turn.num_decodes == len(sizes) for turn in done.turns)
    # Where all prompts fit one step and all sequences end with one, every turn between them is alike.
    median = {name: statistics.median(seconds[-decodes:-1]) for name, seconds in spent.items()} if decodes > 2 else {}
    if median:
        median["rest"] = median["turn"] - sum(median[name] for name in ("schedule", "pack", "stage", "commit"))
    pool = scheduler.block_tables.pool
    return HostRun(
        median, decodes, staging.transfers, unused, pool.num_blocks - 1 - pool.num_free, scheduler.counters.preemptions
    )


def decoding(seqs: int, tokens: int = 200) -> HostRun:
    """Sequences that all decode at once; prompts of every length, so that blocks are filled at every step."""
    return run([64 + i % 64 for i in range(seqs)], [tokens] * seqs)


def mixed(requests: int = 256, seqs: int = 64, num_blocks: int = 0) -> HostRun:
    """Requests of the lengths that conversations have, some of them waiting for slots of the others."""
    ((prompts, lengths),) = workloads.make("sharegpt", VOCAB, requests / workloads.CASES["sharegpt"][0]).rounds
    return run(list(map(len, prompts)), lengths, max_num_seqs=seqs, num_blocks=num_blocks)


def pool_seconds(num_blocks: int, rounds: int = 2000, at_once: int = 8) -> float:
    """Median seconds of taking and returning a few blocks of a pool in which every second block is held and cached."""
    pool = BlockPool(num_blocks, 16)
    held = pool.take((num_blocks - 1) // 2)
    for number, block in enumerate(held):
        pool.register(block, number.to_bytes(16, "little"))
    pool.release(held[::2])
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        pool.release(pool.take(at_once))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def loop_seconds() -> float:
    """A fixed piece of Python, the unit in which machines differ least: a thousand look-ups, sums and appends."""
    return statistics.median(_loop() for _ in range(9))


def _loop() -> float:
    table, items, total = {i: i for i in range(64)}, [], 0
    start = time.perf_counter()
    for i in range(1000):
        total += table[i & 63]
        items.append(total)
    return time.perf_counter() - start
