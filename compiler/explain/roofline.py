"""The least time of a step of each size: bytes over bandwidth or operations over rate, whichever is slower.

Linear products, attention and recurrences follow each other, so their times are added; within each the slower limit counts.
What lies between them, sampling and the gaps between kernels are left out: a floor; the forecast beside it is
`compiler.explain.predict`'s. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pagegraph.compiler.build import LoadedModel, capture_sizes_of, largest_step
from pagegraph.compiler.explain.machines import Machine
from pagegraph.compiler.explain.predict import step_seconds
from pagegraph.compiler.explain.trace import Call, StepTotals, Totals, decodes, prompts
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.step.capture_sizes import Bucket, own_bucket
from pagegraph.compiler.tensor_parallel.modules import Gathered
from pagegraph.kernels.costs import StepRows


@dataclass(frozen=True, slots=True)
class StepFloor:
    """A step of a bucket: what its calls need, and the seconds that takes at least on one of the GPUs that share it."""

    tokens: int
    seqs: int
    context: int  # tokens of each sequence
    decode: bool
    flops: int
    weight_bytes: int
    cache_bytes: int
    memory_s: float
    compute_s: float
    link_bytes: int  # that a rank sends to the others
    link_s: float
    floor_s: float
    predicted_s: float | None  # of a GPU, where the calls are those that the passes left

    @property
    def bound(self) -> str:
        """What the most time goes to."""
        times = {"memory": self.memory_s, "compute": self.compute_s, "link": self.link_s}
        return max(times, key=lambda name: times[name])


def floor_of(totals: StepTotals, machine: Machine) -> tuple[float, float, float]:
    """Seconds at least, those of bytes alone, and those of operations alone."""
    floor = memory_s = compute_s = 0.0
    groups = [[kind for kind in totals if kind not in ("attention", "states")], ["attention"], ["states"]]
    for group in ([kind for kind in group if kind in totals] for group in groups):
        read = sum(totals[kind].bytes for kind in group) / machine.bandwidth
        computed = sum(_compute(totals[kind], machine) for kind in group)
        floor, memory_s, compute_s = floor + max(read, computed), memory_s + read, compute_s + computed
    return floor, memory_s, compute_s


def _compute(one: Totals, machine: Machine) -> float:
    return (one.flops - one.narrow_flops) / machine.flops + one.narrow_flops / machine.narrow_flops


def step_floor(
    model: LoadedModel,
    totals: StepTotals,
    bucket: Bucket,
    context: int,
    machine: Machine,
    calls: list[Call] | None = None,
) -> StepFloor:
    """Of a bucket whose calls need `totals`; with the time that `calls` are expected to take, where they are known."""
    floor, memory_s, compute_s = floor_of(totals, machine)
    sent = sent_bytes(model, bucket)
    link_s = sent / machine.link if machine.link else 0.0
    every, predicted = totals.values(), None
    if calls is not None and machine.device_type == "cuda":
        predicted = step_seconds(calls, bucket.seqs * model.vocab_size * model.dtype.itemsize, machine) + link_s
    return StepFloor(
        bucket.tokens, bucket.seqs, context, is_decode(bucket), sum(one.flops for one in every),
        sum(one.weight_bytes for one in every), sum(one.cache_bytes for one in every), memory_s, compute_s, sent, link_s,
        floor + link_s, predicted,
    )  # fmt: skip


def sent_bytes(model: LoadedModel, bucket: Bucket) -> int:
    """Bytes that a rank sends in a step at least: sums as a ring has them, and its logits to each of the others."""
    sharding = model.paged_model.sharding
    if sharding is None:
        return 0
    size = sharding.ranks.size
    model_of_rank: Any = model.paged_model.model
    head = model_of_rank.get_output_embeddings()
    logits = model.vocab_size // size * model.dtype.itemsize if isinstance(head, Gathered) else 0
    return 2 * (size - 1) * bucket.tokens * summed_bytes(model) // size + (size - 1) * bucket.seqs * logits


def summed_bytes(model: LoadedModel) -> int:
    """Bytes of a token's hidden states that ranks which share the model sum up in one forward; 0 for one rank."""
    sharding = model.paged_model.sharding
    sums = 0 if sharding is None else sharding.num_sums
    return sums * model.paged_model.hidden_size * model.dtype.itemsize


def is_decode(bucket: Bucket) -> bool:
    return bucket.tokens == bucket.seqs


def rows_of(bucket: Bucket, context: int) -> StepRows:
    """The step that fills a bucket: decodes of sequences of `context` tokens, or prompts of as many."""
    return decodes(bucket.seqs, context) if is_decode(bucket) else prompts(bucket.tokens, context)


def buckets_of(options: CompilerOptions, every: bool) -> list[Bucket]:
    """Capture sizes on CUDA, else sizes at which a CPU's steps run; a few that tell, or `every` one."""
    largest = largest_step(options)
    if options.device.type == "cuda":
        found = capture_sizes_of(options).buckets()
    else:
        found = [own_bucket(n, n) for n in range(1, options.step.max_num_seqs + 1)]
        found += [own_bucket(n, 1) for n in _doubling(16, largest.tokens)]
    if every:
        return found
    few = [one for one in found if is_decode(one)], [one for one in found if not is_decode(one)]
    return [*_few(few[0], lambda one: one.tokens), *_few(few[1], lambda one: one.tokens)]


def _doubling(first: int, last: int) -> Sequence[int]:
    sizes = [first]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return [one for one in sizes if one < last] + [last]


def _few(buckets: list[Bucket], size: Callable[[Bucket], int]) -> list[Bucket]:
    """The first, each that is at least twice the one kept before, and the last."""
    kept = buckets[:1]
    for one in buckets[1:]:
        if size(one) >= 2 * size(kept[-1]) or one is buckets[-1]:
            kept.append(one)
    return kept
