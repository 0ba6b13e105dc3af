"""When a sequence ends, and what it counts."""

from __future__ import annotations

import pytest

from runtime.protocol import SamplingParams
from runtime.request import Sequence

EOS = 7


def sequence_of(max_model_len: int = 100, **params) -> Sequence:
    return Sequence("a", [1, 2, 3], SamplingParams(**params), frozenset([EOS]), 0, max_model_len)


def appended(sequence: Sequence, tokens: list[int]) -> list[str]:
    return [sequence.append(token) for token in tokens]


def test_ends_at_max_tokens() -> None:
    assert appended(sequence_of(max_tokens=3), [4, 5, 6]) == ["", "", "length"]


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
    sequence = sequence_of(max_tokens=2)
    sequence.in_flight = 1
    assert (sequence.total, sequence.at_length_limit) == (4, False)
    sequence.append(4)
    assert (sequence.total, sequence.at_length_limit) == (5, True)


def test_a_decode_is_one_token_behind() -> None:
    sequence = sequence_of()
    assert not sequence.is_decode
    sequence.computed, sequence.in_flight = 3, 1
    assert sequence.is_decode
    sequence.computed = 4
    assert not sequence.is_decode


@pytest.mark.parametrize("params", [dict(repetition_penalty=1.1), dict(presence_penalty=0.5), dict(frequency_penalty=-1)])
def test_each_penalty_is_seen(params: dict[str, float]) -> None:
    assert sequence_of(**params).has_penalties and not sequence_of().has_penalties
