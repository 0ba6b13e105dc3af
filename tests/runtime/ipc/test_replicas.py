"""Several engines as one: requests find one that is there, and go to another where theirs ends or has no room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pagegraph.runtime.ipc.connection import EngineDead, RequestFailed
from pagegraph.runtime.ipc.protocol import CacheChanged, Failed, SamplingParams, Submit, TokenDelta
from pagegraph.runtime.ipc.replicas import Address, Replicas
from pagegraph.runtime.ipc.routing import Route
from pagegraph.runtime.scheduler.block_hashes import BlockHashes
from tests.conftest import FakeEngine
from tests.runtime.ipc.test_client import eventually

PARAMS = SamplingParams()
KEY = bytes(32)


def ends(submit: Submit) -> list[TokenDelta]:
    return [TokenDelta(submit.request_id, [submit.token_ids[0]], "length")]


def begins(submit: Submit) -> list[TokenDelta]:
    return [TokenDelta(submit.request_id, [submit.token_ids[0]])]


class Pair:
    """Two engines and a client of both; `follows`: whether new ones come, which nobody starts here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.follows = True
        self.engines = [self.engine(number) for number in range(2)]
        self.client = Replicas(
            [
                Address(self.address(number), lambda number=number: 3.0 + number if self.follows else None)
                for number in range(2)
            ],
            silence_s=5.0,
            block_hash_key=KEY,
        )

    def address(self, number: int) -> str:
        return f"ipc://{self.folder}/e{number}"

    def engine(self, number: int) -> FakeEngine:
        engine = FakeEngine(self.address(number), 100)
        engine.script = ends
        return engine

    def wait_up(self) -> None:
        self.client.info()
        assert eventually(lambda: all(one.connection.is_up for one in self.client.clients))
        assert eventually(lambda: all(engine.watched for engine in self.engines))

    @property
    def submitted(self) -> list[list[int]]:
        """First tokens of what each was given."""
        return [[submit.token_ids[0] for submit in engine.submits] for engine in self.engines]


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("p"))
    yield made
    made.client.close()
    for engine in made.engines:
        engine.stop()


def test_a_prefix_draws_its_requests_and_the_others_take_turns(pair: Pair) -> None:
    prompt = list(range(70))
    (chain,) = Route.of([prompt], 1, "", BlockHashes(16, KEY)).chains
    pair.engines[1].cache = CacheChanged(True, list(chain))
    pair.wait_up()
    for salt in ("", "", "other", "another", ""):
        assert pair.client.submit_group([(prompt, PARAMS)], cache_salt=salt).get(5)[1].token_ids == [0]
    salts = [[submit.cache_salt for submit in engine.submits] for engine in pair.engines]
    assert salts[1].count("") == 3 and sorted(salts[0] + salts[1]) == ["", "", "", "another", "other"]
    assert "other" in salts[0]  # it had not been chosen before


def test_facts_are_those_of_all(pair: Pair) -> None:
    for number, engine in enumerate(pair.engines):
        engine.info = msgspec.structs.replace(
            engine.info, num_running=number + 1, num_waiting=2, max_model_len=128 - number
        )
    pair.wait_up()
    info = pair.client.info()
    assert (info.num_running, info.num_waiting, info.max_model_len) == (3, 4, 127)
    pair.client.submit_group([([1], PARAMS)], label="a").get(5)
    pair.client.submit_group([([1], PARAMS)], label="b").get(5)
    assert pair.submitted == [[1], [1]]
    assert [one.label for one in pair.client.recent("", 5)] == ["a", "b"]


def test_what_an_engine_that_dies_has_not_begun_goes_to_the_other(pair: Pair) -> None:
    pair.engines[0].script = lambda s: begins(s) if s.token_ids[0] < 2 else []
    pair.engines[1].script = lambda s: begins(s) if s.token_ids[0] < 2 else []
    pair.wait_up()
    groups = [pair.client.submit_group([([number], PARAMS)]) for number in range(8)]
    assert eventually(lambda: list(map(len, pair.submitted)) == [4, 4])
    theirs = pair.submitted
    for number in range(2):
        assert groups[number].get(5)[1].token_ids == [number]
    pair.engines[1].script = ends
    pair.engines[0].stop()
    began = next(number for number in range(2) if number in theirs[0])
    with pytest.raises(EngineDead) as dead:  # what a client has seen is not taken back
        groups[began].get(5)
    assert dead.value.retry_after_s == 1.0  # another is there
    for number in theirs[0]:
        if number != began:
            assert groups[number].get(5)[1].token_ids == [number]
    assert pair.submitted[1][4:] == [number for number in theirs[0] if number != began]
    assert all(pair.engines[1].taken[4:])  # which was admitted before, so however full its queue is
    survivor = groups[1 - began]
    assert survivor.get(0.1) is None and survivor.num_open == 1  # nothing has happened to it
    assert pair.client.submit_group([([50], PARAMS)]).get(5)[1].token_ids == [50]


def test_an_abort_finds_its_request_wherever_it_is_now(pair: Pair) -> None:
    pair.engines[0].script = pair.engines[1].script = lambda s: []
    pair.wait_up()
    groups = [pair.client.submit_group([([number], PARAMS)]) for number in range(2)]
    assert eventually(lambda: list(map(len, pair.submitted)) == [1, 1])
    pair.engines[0].stop()
    assert eventually(lambda: len(pair.submitted[1]) == 2)
    moved = groups[pair.submitted[1][-1]]
    moved.abort()
    assert eventually(lambda: pair.engines[1].aborts == moved.request_ids)


def test_a_full_queue_hands_its_request_on_and_the_last_one_says_so(pair: Pair) -> None:
    full = lambda s: [Failed(s.request_id, 503, "the queue is full", retry_after_s=9.0)]  # noqa: E731
    pair.engines[0].script = full
    pair.wait_up()
    for number in range(3):
        assert pair.client.submit_group([([number], PARAMS)]).get(5)[1].token_ids == [number]
    assert len(pair.submitted[1]) == 3
    pair.engines[1].script = full
    with pytest.raises(RequestFailed) as refused:
        pair.client.submit_group([([9], PARAMS), ([9], PARAMS)]).get(5)
    assert (refused.value.status, refused.value.retry_after_s) == (503, 9.0)


def test_where_no_engine_is_left_requests_wait_for_the_first_that_comes(pair: Pair) -> None:
    pair.engines[0].script = pair.engines[1].script = lambda s: []
    pair.wait_up()
    groups = [pair.client.submit_group([([number], PARAMS)]) for number in range(2)]
    assert eventually(lambda: list(map(len, pair.submitted)) == [1, 1])
    for engine in pair.engines:
        engine.silent = True  # so that none hands over what the other will hand back
    stopped = pair.submitted[0][0]
    pair.engines[1].stop()
    pair.engines[0].stop()
    assert eventually(lambda: not any(one.connection.is_up for one in pair.client.clients))
    with pytest.raises(EngineDead) as dead:
        pair.client.submit_group([([7], PARAMS)])
    assert dead.value.retry_after_s == 3.0
    pair.engines[0] = pair.engine(0)
    assert groups[stopped].get(5)[1].token_ids == [stopped]


def test_the_end_of_all_engines_ends_what_waits(pair: Pair) -> None:
    pair.engines[0].script = pair.engines[1].script = lambda s: []
    pair.wait_up()
    group = pair.client.submit_group([([1], PARAMS)])
    pair.follows = False
    for engine in pair.engines:
        engine.stop()
    with pytest.raises((EngineDead, RequestFailed)):
        group.get(5)
