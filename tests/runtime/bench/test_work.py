"""Made-up work: lengths, what is shared, which request follows which."""

from __future__ import annotations

import pytest

from pagegraph.runtime.bench.work import FIRST_ID, Request, Shape, join, made_up, rounds


def test_random_ids_have_their_lengths_and_range() -> None:
    requests = made_up(20, Shape(input_len=7, output_len=3), vocab_size=50)
    assert len(requests) == 20 and {len(one.prompt) for one in requests} == {7}
    assert {(one.output_len, one.input_len, one.follows) for one in requests} == {(3, 7, None)}
    assert all(FIRST_ID <= id < 50 for one in requests for id in one.prompt)
    assert len({tuple(one.prompt) for one in requests}) == 20


def test_the_seed_decides() -> None:
    shape = Shape(input_len=16, range_ratio=0.5)
    assert made_up(9, shape, seed=4) == made_up(9, shape, seed=4) != made_up(9, shape, seed=5)


def test_lengths_within_their_range() -> None:
    requests = made_up(400, Shape(input_len=100, output_len=10, range_ratio=0.5))
    assert {min(len(one.prompt) for one in requests), max(len(one.prompt) for one in requests)} == {50, 150}
    assert {one.output_len for one in requests} == set(range(5, 16))


def test_groups_share_their_prefix_and_nothing_else() -> None:
    requests = made_up(6, Shape(input_len=8, prefix_len=32, num_prefixes=2))
    begins = [tuple(one.prompt[:32]) for one in requests]
    assert begins[0] == begins[2] == begins[4] != begins[1] == begins[3] == begins[5]
    assert {len(one.prompt) for one in requests} == {40} and len({tuple(one.prompt[32:]) for one in requests}) == 6


def test_conversations_turn_by_turn() -> None:
    requests = made_up(8, Shape(input_len=4, prefix_len=2, num_turns=3), vocab_size=None)
    assert [one.follows for one in requests] == [None, None, None, 0, 1, 2, 3, 4]
    assert [len(str(one.prompt).split()) for one in requests] == [6, 6, 6, 4, 4, 4, 4, 4]
    assert rounds(requests) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_text_of_as_many_words() -> None:
    (one,) = made_up(1, Shape(input_len=12), vocab_size=None)
    assert isinstance(one.prompt, str) and len(one.prompt.split()) == 12 and one.prompt.startswith(" ")


def test_ids_and_text_do_not_join() -> None:
    assert join("a", "b") == "ab" and join([1], [2]) == [1, 2] and rounds([]) == []
    with pytest.raises(TypeError):
        join("a", [1])
    assert rounds([Request("a", 1), Request("b", 1)]) == [[0, 1]]
