"""Packing: one plan by hand, field by field. The scheduler's fuzz runs it on thousands of plans."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.step_input import StepInput, StepOutput
from runtime.batch import pack
from runtime.blocks import BlockPool
from runtime.protocol import SamplingParams
from runtime.request import Sequence
from runtime.scheduler import Scheduler

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
    plan = scheduler.schedule(0)
    packed = pack(plan, scheduler.rows)
    scheduler.commit(plan, StepOutput(np.full(len(plan), 5, np.int32)))
    return packed


def test_a_mixed_step_field_by_field() -> None:
    scheduler = scheduler_of()
    a = add(scheduler, "a", [1, 2, 3, 4, 6], seed=11, temperature=0.5, top_k=3, top_p=0.75, min_p=0.25)
    step(scheduler)
    b = add(scheduler, "b", list(range(20, 38)), seed=-(2**62), repetition_penalty=1.5, presence_penalty=0.5)
    packed = pack(scheduler.schedule(1), scheduler.rows)
    assert packed.token_ids.tolist() == [5, *range(20, 31)]
    assert packed.positions.tolist() == [5, *range(11)]
    a_blocks, b_blocks = scheduler.rows.blocks_of(a.row), scheduler.rows.blocks_of(b.row)
    assert packed.slots.tolist() == [a_blocks[1] * BLOCK + 1, *(b_blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(11))]
    assert packed.rows.tolist() == [a.row, b.row] and a.row != b.row
    assert packed.query_start.tolist() == [0, 1, 12]
    assert packed.seq_lens.tolist() == [6, 11]
    assert packed.block_tables.tolist() == [a_blocks + [0] * (len(b_blocks) - 2), b_blocks]
    assert packed.sampled.tolist() == [True, False]
    sampling = packed.sampling
    assert sampling.temperature.tolist() == [0.5, 1.0] and sampling.top_k.tolist() == [3, 0]
    assert sampling.top_p.tolist() == [0.75, 1.0] and sampling.min_p.tolist() == [0.25, 0.0]
    assert sampling.seeds.tolist() == [11, -(2**62)] and sampling.positions.tolist() == [6, 11]
    assert sampling.repetition.tolist() == [1.0, 1.5] and sampling.presence.tolist() == [0.0, 0.5]
    assert sampling.frequency.tolist() == [0.0, 0.0]


def test_dtypes_are_those_of_the_step() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3], logit_bias={3: 1.0}, min_tokens=1, allowed_token_ids=[1], presence_penalty=1.0)
    packed = step(scheduler)
    for name in ("token_ids", "positions", "slots", "rows", "query_start", "seq_lens", "block_tables"):
        assert getattr(packed, name).dtype == np.int32, name
    assert packed.sampled.dtype == bool and packed.sampling.seeds.dtype == np.int64
    for name in ("top_k", "positions", "bias_rows", "bias_tokens"):
        assert getattr(packed.sampling, name).dtype == np.int32, name
    for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias_values"):
        array = getattr(packed.sampling, name)
        assert array.dtype == np.float32 and array.flags.c_contiguous, name
    assert packed.sampling.allowed[0].dtype == np.int32
    assert [ids.dtype for ids in packed.sampling.penalty_reset[0][1:]] == [np.int32, np.int32]


def test_a_token_still_on_the_device_is_minus_one() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3])
    scheduler.schedule(0)
    packed = pack(scheduler.schedule(1), scheduler.rows)
    assert (packed.token_ids.tolist(), packed.positions.tolist(), packed.seq_lens.tolist()) == ([-1], [3], [4])
    assert packed.sampling.positions.tolist() == [4]


def biases(packed: StepInput) -> list[tuple[int, int, float]]:
    sampling = packed.sampling
    return sorted(zip(sampling.bias_rows.tolist(), sampling.bias_tokens.tolist(), sampling.bias_values.tolist()))


def test_stop_ids_are_masked_for_the_first_min_tokens() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3])
    add(scheduler, "b", [1, 2, 4], min_tokens=2, stop_token_ids=[9], logit_bias={4: 2.5})
    masked = [(1, 4, 2.5), (1, 7, -np.inf), (1, 9, -np.inf)]
    assert [biases(step(scheduler)) for _ in range(3)] == [masked, masked, [(1, 4, 2.5)]]


def test_min_tokens_counts_what_is_in_flight() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", [1, 2, 3], min_tokens=2)
    assert [biases(pack(scheduler.schedule(0), scheduler.rows)) for _ in range(3)] == [[(0, 7, -np.inf)]] * 2 + [[]]


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


def test_penalty_counts_are_rebuilt_only_where_a_sequence_enters_a_row() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=4)
    sequence = add(scheduler, "a", [1, 2, 3, 4, 6, 8], frequency_penalty=0.5)
    resets = [step(scheduler).sampling.penalty_reset for _ in range(3)]
    assert [len(reset) for reset in resets] == [1, 0, 0]
    row, prompt, outputs = resets[0][0]
    assert (row, prompt.tolist(), outputs.tolist()) == (sequence.row, [1, 2, 3, 4, 6, 8], [])
