"""A built model beside what was said of it: bytes that its tensors take, milliseconds of steps, the kernels in them.

Builds as the engine does. Steps are of random tokens, which choose experts as different texts do, and read blocks of
their own, spread over the pool and filled with random values. On CUDA the device's time is measured, that of the step's
graph replayed back to back; the host's work is not in it, as it is done meanwhile. Knows no requests.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.explain.ledger import Weights, state_tensors, weights_of
from pagegraph.compiler.explain.roofline import is_decode, rows_of
from pagegraph.compiler.host import step_thread
from pagegraph.compiler.profile.device_time import median_seconds
from pagegraph.compiler.profile.memory import MemoryProfile
from pagegraph.compiler.step.caches import Caches
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.cuda_runner import CudaRunner
from pagegraph.compiler.step.inputs import SamplingInput, StepInput
from pagegraph.compiler.step.step import CompiledStep

REPEATS = 5
DEVICE_S = 0.5  # that a step of each size is replayed for: as long as it takes a GPU to come to the clock it keeps
KERNELS = 8  # that are named
FILLED = 256  # blocks of random values, of which the others are copies


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """Bytes of what is there."""

    weights: list[Weights]
    state: int
    slots: int
    blocks: int
    num_blocks: int
    resident: int  # of this process, less what it had before the build; on CUDA what it holds of the device's memory
    step: (
        int | None
    )  # of the largest step and of CUDA graphs, as a start measures them to size the KV cache; None: it did not
    graphs: int | None

    @property
    def weight_bytes(self) -> int:
        return sum(one.bytes for one in self.weights)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel or op of a step: milliseconds of its own, and calls."""

    name: str
    ms: float
    calls: int


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """Milliseconds of a step, the median of a few; kernels that take the most, where they were looked at."""

    tokens: int
    seqs: int
    ms: float
    kernels: list[Kernel]


def measured_memory(built: BuiltModel, resident_before: int, profiles: Sequence[MemoryProfile] = ()) -> MeasuredMemory:
    """Of a built model and its draft model; `profiles`: what its start has measured of them, if it has."""
    states = [step.state for step in built.steps]
    return MeasuredMemory(
        weights=[one for step in built.steps for one in weights_of(step.paged_model.model)],
        state=sum(map(state_tensors, states)),
        slots=sum(state.caches.state_bytes for state in states),
        blocks=sum(state.caches.block_bytes for state in states) * built.num_blocks,
        num_blocks=built.num_blocks,
        resident=resident(built.device) - resident_before,
        step=max((one.step for one in profiles), default=None),
        graphs=sum(one.graphs for one in profiles) if profiles else None,
    )


def resident(device: torch.device) -> int:
    """Bytes of memory of this process; on CUDA, of the device's in use by any process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measured_steps(
    step: CompiledStep, buckets: Sequence[Bucket], context: int, num_blocks: int, kernels_of: set[Bucket]
) -> list[MeasuredStep]:
    """Run a step that fills each bucket, as far as there are slots; nothing may be in flight."""
    fill_blocks(step.state.caches)
    cuda = step.state.last_tokens.device.type == "cuda"
    steps = [_step(step, bucket, context, num_blocks) for bucket in buckets]
    seconds = [device_seconds(step, one) if cuda else _host_seconds(step, one) for one in steps]
    # behind all that is timed: a profiler leaves hooks that slow every launch after it
    kernels = [profiled(step, one) if bucket in kernels_of else [] for bucket, one in zip(buckets, steps)]
    return [
        MeasuredStep(bucket.tokens, bucket.seqs, 1e3 * taken, found)
        for bucket, taken, found in zip(buckets, seconds, kernels)
    ]


@torch.inference_mode()
def fill_blocks(caches: Caches) -> None:
    """Random values in every block: zeros are read and multiplied faster than what a model writes."""
    for cache in (*caches.key_caches, *caches.value_caches):
        some = cache[:FILLED]
        some.copy_(torch.randn(some.shape, device=cache.device))
        for part in cache[FILLED:].split(FILLED):
            part.copy_(some[: len(part)])


@torch.inference_mode()
def device_seconds(step: CompiledStep, one: StepInput) -> float:
    """Seconds that a step takes on its CUDA device: median of its graph's replays, which are enqueued back to back.

    A step without a graph is launched as often. Tokens have to be the host's, so that each replay runs the same step.
    """
    step.launch(one).wait()
    one.new_blocks = one.new_blocks[:0]  # the tables know them now
    runner = step.runner
    assert isinstance(runner, CudaRunner)
    bucket = runner.capture_sizes.bucket(one.num_tokens, one.num_seqs)
    if bucket is None or bucket not in runner.graphs:
        return median_seconds(lambda: step.launch(one), DEVICE_S)
    step.staging.send(one, bucket)
    return median_seconds(lambda: runner.graphs.replay(bucket), DEVICE_S)


def _host_seconds(step: CompiledStep, one: StepInput) -> float:
    """Median seconds from launch to result, after a step that warms up."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        step.launch(one).wait()
        seconds.append(time.perf_counter() - start)
        one.new_blocks = one.new_blocks[:0]
    return statistics.median(seconds[1:])


def _step(step: CompiledStep, bucket: Bucket, context: int, num_blocks: int) -> StepInput:
    """Random tokens of sequences of `context` tokens in slots of their own, whose blocks come in turn from the pool."""
    state = step.state
    rows, lengths = rows_of(bucket, context)
    rows, lengths = rows[: state.dummy_slot], lengths[: state.dummy_slot]
    seqs = len(rows)
    random = np.random.default_rng(0)
    needed = -(-lengths // state.block_size)
    slots = np.repeat(np.arange(seqs), needed)
    index = np.concatenate([np.arange(n) for n in needed])
    blocks = 1 + random.permutation(num_blocks - 1)[np.arange(len(slots)) % (num_blocks - 1)]
    return StepInput(
        token_ids=random.integers(0, state.vocab_size, int(rows.sum()), np.int32),
        slots=np.arange(seqs, dtype=np.int32),
        query_start=np.concatenate([[0], np.cumsum(rows)]).astype(np.int32),
        starts=(lengths - rows).astype(np.int32),
        sampled=np.full(seqs, is_decode(bucket)),
        new_blocks=np.stack([slots, index, blocks], axis=1).astype(np.int32),
        sampling=SamplingInput(temperature=np.zeros(seqs, np.float32), seeds=np.zeros(seqs, np.int64)),
    )


def profiled(step: CompiledStep, one: StepInput) -> list[Kernel]:
    """The kernels, or on a CPU the ops, that take the most of a step; loops that the compiler wrote for a CPU have no name."""
    cuda = step.state.last_tokens.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]

    def run() -> Any:
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(REPEATS):
                if cuda:
                    step.launch(one).wait()
                else:
                    step.runner._run(one, 1)
        return profile

    profile = run() if cuda else step_thread.submit(run).result()  # a CPU's profile is of the thread that steps run on
    taken = [
        Kernel(event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / REPEATS,
               event.count // REPEATS)
        for event in profile.key_averages()
    ]  # fmt: skip
    return sorted(taken, key=lambda kernel: -kernel.ms)[:KERNELS]
