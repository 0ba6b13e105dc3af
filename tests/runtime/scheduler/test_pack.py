"""Packing: one plan by hand, field by field. The scheduler's fuzz runs it on thousands of plans."""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.compiler.step.inputs import StepInput, StepOutput
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.pack import Packer
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence

BLOCK = 4
EOS = 7


def scheduler_of(**overrides) -> Scheduler:
    sizes = dict(max_num_seqs=4, max_num_batched_tokens=12, max_model_len=40)
    return Scheduler(BlockPool(30, BLOCK), **{**sizes, **overrides})


def add(scheduler: Scheduler, name: str, tokens: list[int], seed: int = 0, **params) -> Sequence:
    sequence = Sequence(name, tokens, SamplingParams(**params), frozenset([EOS]), seed, 40)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> StepInput:
    """Schedule, pack and commit token 5 for every sequence."""
    plan = scheduler.schedule()
    packed = Packer(scheduler.batch).pack(plan)
    scheduler.finish(scheduler.commit(plan, StepOutput(np.full(len(plan), 5, np.int32))))
    return packed


def test_a_mixed_step_field_by_field() -> None:
    scheduler = scheduler_of()
    a = add(scheduler, "a", [1, 2, 3, 4, 6], seed=11, temperature=0.5, top_k=3, top_p=0.75, min_p=0.25)
    step(scheduler)
    b = add(scheduler, "b", list(range(20, 38)), seed=-(2**62), repetition_penalty=1.5, presence_penalty=0.5)
    packed = Packer(scheduler.batch).pack(scheduler.schedule())
    assert packed.token_ids.tolist() == [5, *range(20, 31)]
    assert packed.slots.tolist() == [a.slot, b.slot] and a.slot != b.slot
    assert packed.query_start.tolist() == [0, 1, 12]
    assert packed.starts.tolist() == [5, 0] and packed.seq_lens.tolist() == [6, 11]
    assert packed.new_blocks.tolist() == [
        [b.slot, index, block] for index, block in enumerate(scheduler.batch.blocks_of(b.slot))
    ]
    assert packed.sampled.tolist() == [True, False]
    sampling = packed.sampling
    assert sampling.temperature.tolist() == [0.5, 1.0] and sampling.seeds.tolist() == [11, -(2**62)]
    filters, penalties = sampling.filters, sampling.penalties
    assert filters.top_k.tolist() == [3, 0]
    assert filters.top_p.tolist() == [0.75, 1.0] and filters.min_p.tolist() == [0.25, 0.0]
    assert penalties.repetition.tolist() == [1.0, 1.5] and penalties.presence.tolist() == [0.0, 0.5]
    assert penalties.frequency.tolist() == [0.0, 0.0]


def test_only_new_blocks_travel() -> None:
    """A block for the prompt, then those of the next eight tokens at once."""
    scheduler = scheduler_of()
    a = add(scheduler, "a", [1, 2, 3])
    seen = [step(scheduler).new_blocks.tolist() for _ in range(6)]
    queries = [[a.slot, index, block] for index, block in enumerate(scheduler.batch.blocks_of(a.slot))]
    assert seen == [queries[:1], [], queries[1:], [], [], []] and len(queries) == 4


def test_what_a_slot_begins_with_travels_uncopied() -> None:
    """A device that looks up needs the tokens that no step computes; any other leaves them alone."""
    scheduler = scheduler_of()
    add(scheduler, "a", list(range(9)))
    assert step(scheduler).cached == []
    again, new = add(scheduler, "b", list(range(9))), add(scheduler, "c", [5, 6])
    plan = scheduler.schedule()
    ((slot, tokens),) = Packer(scheduler.batch).pack(plan).cached
    assert plan.started == [again, new] and (slot, tokens.tolist()) == (again.slot, list(range(8)))
    assert np.shares_memory(tokens, again.tokens)


def test_what_nobody_asks_for_is_not_sent() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3], temperature=0.5)
    sampling = step(scheduler).sampling
    assert sampling.is_plain and sampling.filters is None and sampling.penalties is None and sampling.bias is None


def test_dtypes_are_those_of_the_step() -> None:
    scheduler = scheduler_of()
    asked = dict(logit_bias={3: 1.0}, min_tokens=1, allowed_token_ids=[1], presence_penalty=1.0, top_k=2)
    add(scheduler, "a", [1, 2, 3], **asked)
    packed = step(scheduler)
    sampling = packed.sampling
    for name in ("token_ids", "slots", "query_start", "starts", "new_blocks", "seq_lens"):
        assert getattr(packed, name).dtype == np.int32, name
    assert (
        packed.sampled.dtype == bool and sampling.seeds.dtype == np.int64 and sampling.temperature.dtype == np.float32
    )
    filters, penalties = sampling.filters, sampling.penalties
    assert [one.dtype for one in (filters.top_k, filters.top_p, filters.min_p)] == [np.int32, np.float32, np.float32]
    for array in (penalties.repetition, penalties.presence, penalties.frequency):
        assert array.dtype == np.float32 and array.flags.c_contiguous
    assert [one.dtype for one in sampling.bias] == [np.int32, np.int32, np.float32]
    assert sampling.allowed[0].dtype == np.int32
    assert [ids.dtype for ids in sampling.penalty_reset[0][1:]] == [np.int32, np.int32]


def test_a_token_still_on_the_device_is_minus_one() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3])
    scheduler.schedule()
    packed = Packer(scheduler.batch).pack(scheduler.schedule())
    assert (packed.token_ids.tolist(), packed.starts.tolist(), packed.seq_lens.tolist()) == ([-1], [3], [4])


def biases(packed: StepInput) -> list[tuple[int, int, float]]:
    return sorted(zip(*(one.tolist() for one in packed.sampling.bias))) if packed.sampling.bias else []


def test_stop_ids_are_masked_for_the_first_min_tokens() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3])
    add(scheduler, "b", [1, 2, 4], min_tokens=2, stop_token_ids=[9], logit_bias={4: 2.5})
    masked = [(1, 4, 2.5), (1, 7, -np.inf), (1, 9, -np.inf)]
    assert [biases(step(scheduler)) for _ in range(3)] == [masked, masked, [(1, 4, 2.5)]]


def test_min_tokens_counts_what_is_in_flight() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3], min_tokens=2)
    assert [biases(Packer(scheduler.batch).pack(scheduler.schedule())) for _ in range(3)] == [[(0, 7, -np.inf)]] * 2 + [
        []
    ]


def test_a_chunk_that_samples_nothing_asks_for_nothing() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=8)
    add(scheduler, "a", list(range(10)), min_tokens=2, logit_bias={1: 1.0}, allowed_token_ids=[1, 2], logprobs=3)
    first, second = step(scheduler), step(scheduler)
    assert (biases(first), first.sampling.allowed, first.sampling.num_logprobs) == ([], {}, -1)
    assert biases(second) and second.sampling.allowed[0].tolist() == [1, 2] and second.sampling.num_logprobs == 3


@pytest.mark.parametrize(("asked", "expected"), [([None, None], -1), ([None, 0], 0), ([2, 5], 5)])
def test_logprobs_are_the_most_that_anyone_asked(asked: list[int | None], expected: int) -> None:
    scheduler = scheduler_of()
    for index, logprobs in enumerate(asked):
        add(scheduler, str(index), [1, 2, index], logprobs=logprobs)
    assert step(scheduler).sampling.num_logprobs == expected


def test_penalty_counts_are_rebuilt_only_where_a_sequence_enters_a_slot() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=4)
    sequence = add(scheduler, "a", [1, 2, 3, 4, 6, 8], frequency_penalty=0.5)
    resets = [step(scheduler).sampling.penalty_reset for _ in range(3)]
    assert [len(reset) for reset in resets] == [1, 0, 0]
    slot, prompt, outputs = resets[0][0]
    assert (slot, prompt.tolist(), outputs.tolist()) == (sequence.slot, [1, 2, 3, 4, 6, 8], [])
