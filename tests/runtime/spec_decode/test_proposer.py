"""Who proposes: the n-gram proposer and the suffix automaton against plain searches."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.kernels.spec_decode.reference import MAX_MATCH
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.spec_decode.proposer import NgramProposer, Proposer
from pagegraph.runtime.spec_decode.suffix import BORDER, Automaton, SuffixProposer

texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)


epochs = count(1)


def batch_of(text: list[int]) -> InputBatch:
    batch = InputBatch(1, 200, 16)
    batch.enter(Sequence("a", np.array(text), SamplingParams(), frozenset(), 0, 200), [], 0)
    batch.epoch[0] = next(epochs)
    return batch


def proposed(drafter: Proposer, text: list[int], limit: int = 4) -> tuple[list[int], int]:
    proposal = drafter.propose(batch_of(text), np.zeros(1, np.int32), np.full(1, limit, np.int32))
    return proposal.tokens[0, : proposal.counts[0]].tolist(), int(proposal.matched[0])


@given(text=texts, least=st.integers(1, 3), more=st.integers(0, 3))
def test_ngram_is_the_latest_of_the_longest(text: list[int], least: int, more: int) -> None:
    most = least + more
    expected = []
    for length in range(min(most, len(text) - 1), least - 1, -1):
        ends = [end for end in range(length, len(text)) if text[end - length : end] == text[-length:]]
        if ends:
            expected = [text[ends[-1] + i % (len(text) - ends[-1])] for i in range(4)]
            break
    got, matched = proposed(NgramProposer(least, most), text)
    assert got == expected and (matched >= least if got else not matched)


@pytest.mark.parametrize(
    ("text", "tokens", "matched"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2], 3),
        ([7, 1, 2, 8, 1, 2, 9, 1, 2], [9, 1, 2, 9], 2),
        ([5, 5, 5], [5, 5, 5, 5], 2),
        ([1, 2, 3], [], 0),
        ([*range(50), *range(40)], [40, 41, 42, 43], MAX_MATCH),
    ],
)
def test_ngram_by_hand(text: list[int], tokens: list[int], matched: int) -> None:
    """A match that runs into its own end goes on periodically; its whole length is told, beyond what was asked for."""
    assert proposed(NgramProposer(2, 3), text) == (tokens, matched)


@given(text=texts, query=texts)
def test_the_automaton_finds_the_longest_suffix_that_it_has_read(text: list[int], query: list[int]) -> None:
    automaton = Automaton()
    for token in text:
        automaton.read(token)
    place = (0, 0)
    for at, token in enumerate(query, 1):
        place = automaton.follow(place, token)
        inside = lambda n: any(text[i : i + n] == query[at - n : at] for i in range(len(text) - n + 1))  # noqa: E731
        assert place[1] == max((n for n in range(1, at + 1) if inside(n)), default=0)
        if place[1]:
            length, follows = place[1], automaton.after(place, 3)
            spots = [i + length for i in range(len(text)) if text[i : i + length] == query[at - length : at]]
            assert any(text[spot : spot + 3] == follows for spot in spots)


def test_outputs_of_others_are_remembered_to_their_end() -> None:
    suffix = SuffixProposer(2)
    suffix.ended(np.array([10, 11, 12, 13]))
    suffix.ended(np.array([20, 21, 22, 23, 24]))
    assert proposed(suffix, [1, 10, 11]) == ([12, 13], 2)
    assert proposed(suffix, [1, 10, 11, 12, 13])[0] == [], "nothing is known behind the end of an output"
    assert proposed(suffix, [21, 22, 9, 20, 21, 22]) == ([23, 24], 3), "the longer match proposes"
    assert proposed(suffix, [20, 21, 7, 9, 20, 21]) == ([7, 9, 20, 21], 2), "of equals the slot's own"
    assert BORDER not in proposed(suffix, [22, 23], 9)[0]


def test_a_slot_is_followed_as_it_grows_and_anew_when_another_enters_it() -> None:
    suffix, batch = SuffixProposer(2), batch_of([1, 10])
    suffix.ended(np.array([10, 11, 12, 13, 14]))

    def next_tokens() -> list[int]:
        proposal = suffix.propose(batch, np.zeros(1, np.int32), np.full(1, 2, np.int32))
        return proposal.tokens[0, : proposal.counts[0]].tolist()

    assert next_tokens() == []
    for token, expected in ((11, [12, 13]), (12, [13, 14]), (9, [])):
        batch.tokens[0, batch.known[0]] = token
        batch.known[0] += 1
        assert next_tokens() == expected
    batch.leave(0)
    next(batch._epochs)
    batch.enter(Sequence("b", np.array([12, 13]), SamplingParams(), frozenset(), 0, 200), [], 0)
    assert next_tokens() == [14]
