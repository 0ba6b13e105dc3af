"""When a sequence ends, as the scheduler commits its tokens, and what a sequence says of itself."""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.compiler.step.inputs import StepOutput
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence

EOS = 7


def sequence_of(max_model_len: int = 40, **params) -> Sequence:
    return Sequence("a", [1, 2, 3], SamplingParams(**params), frozenset([EOS]), 0, max_model_len)


def appended(sequence: Sequence, tokens: list[int]) -> list[str]:
    """The finish reason after each token, "" while it goes on."""
    scheduler = Scheduler(BlockPool(20, 4), max_num_seqs=1, max_num_batched_tokens=8, max_model_len=40)
    scheduler.add(sequence)
    reasons = []
    for token in tokens:
        plan = scheduler.schedule()
        assert plan is not None, "the sequence had ended"
        scheduler.finish(scheduler.commit(plan, StepOutput(np.array([token], np.int32))))
        reasons.append(sequence.finish_reason)
    return reasons


def test_ends_at_max_tokens() -> None:
    sequence = sequence_of(max_tokens=3)
    assert appended(sequence, [4, 5, 6]) == ["", "", "length"]
    assert (sequence.tokens.tolist(), sequence.num_generated) == ([1, 2, 3, 4, 5, 6], 3)


def test_ends_at_max_model_len() -> None:
    assert appended(sequence_of(max_model_len=5, max_tokens=50), [4, 5]) == ["", "length"]


@pytest.mark.parametrize("token", [EOS, 9])
def test_ends_at_eos_and_stop_ids_and_says_which(token: int) -> None:
    sequence = sequence_of(max_tokens=9, stop_token_ids=[9])
    assert appended(sequence, [4, token]) == ["", "stop"]
    assert sequence.stop_reason == token


def test_eos_is_a_token_like_others_when_ignored_but_a_stop_id_is_not() -> None:
    sequence = sequence_of(max_tokens=9, ignore_eos=True, stop_token_ids=[9])
    assert appended(sequence, [EOS, 9]) == ["", "stop"]


def test_a_stop_within_min_tokens_does_not_count() -> None:
    sequence = sequence_of(max_tokens=9, min_tokens=2)
    assert appended(sequence, [EOS, EOS, EOS]) == ["", "", "stop"]


def test_length_comes_before_stop() -> None:
    sequence = sequence_of(max_tokens=2)
    assert appended(sequence, [4, EOS]) == ["", "length"]
    assert sequence.stop_reason == -1


def test_tokens_in_flight_count_towards_the_limit() -> None:
    scheduler = Scheduler(BlockPool(20, 4), max_num_seqs=1, max_num_batched_tokens=8, max_model_len=40)
    scheduler.add(sequence_of(max_tokens=2))
    plans = [scheduler.schedule() for _ in range(3)]
    assert [plan and plan.counts.tolist() for plan in plans] == [[3], [1], None]


@pytest.mark.parametrize(
    "params", [dict(repetition_penalty=1.1), dict(presence_penalty=0.5), dict(frequency_penalty=-1)]
)
def test_each_penalty_is_seen(params: dict[str, float]) -> None:
    assert sequence_of(**params).has_penalties and not sequence_of().has_penalties
