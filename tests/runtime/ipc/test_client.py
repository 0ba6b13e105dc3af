"""The web end: streams, aborts, and every way an engine can die."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from pagegraph.runtime.ipc.client import EngineClient, EngineDead, RequestFailed
from pagegraph.runtime.ipc.protocol import Failed, SamplingParams, Submit, TokenDelta

PARAMS = SamplingParams()


@pytest.fixture
def client(fake_engine) -> Iterator[EngineClient]:
    client = EngineClient(fake_engine.address, heartbeat_s=0.05, silence_s=1.0)
    yield client
    client.close()


def eventually(condition) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_info_and_a_stream(client: EngineClient, fake_engine) -> None:
    assert client.info() == fake_engine.info
    deltas = list(client.submit([1, 2, 3], PARAMS, priority=4, cache_salt="s", timeout=5))
    assert deltas[-1].finish_reason == "stop" and len(deltas) >= 2
    sent = fake_engine.submits[0]
    assert (sent.token_ids, sent.priority, sent.cache_salt) == ([1, 2, 3], 4, "s")


def test_many_threads_get_their_own_tokens(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: [
        TokenDelta(s.request_id, [s.token_ids[0]], "" if i < 9 else "length") for i in range(10)
    ]
    results: dict[int, set[int]] = {}

    def run(number: int) -> None:
        results[number] = {i for delta in client.submit([number], PARAMS, timeout=10) for i in delta.token_ids}

    threads = [threading.Thread(target=run, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {number: {number} for number in range(40)}


def test_abort_reaches_the_engine_once(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [1])]
    stream = client.submit([1], PARAMS)
    assert stream.get(5).token_ids == [1]
    assert stream.get(0.05) is None
    stream.abort()
    stream.abort()
    assert eventually(lambda: fake_engine.aborts)
    assert fake_engine.aborts == [stream.request_id]


def test_what_ended_by_its_text_says_so(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [1])]
    group = client.submit_group([([1], PARAMS), ([2], PARAMS)])
    group.stop(1)
    group.stop(1)
    group.abort()
    assert eventually(lambda: len(fake_engine.aborts) == 2)
    assert fake_engine.aborted == dict(zip(group.request_ids, ["abort", "stop"]))


def test_no_token_in_time(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: []
    with pytest.raises(TimeoutError):
        list(client.submit([1], PARAMS, timeout=0.05))


def test_a_failed_sequence_names_itself(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: [Failed(s.request_id, 400, "too odd")] if s.token_ids == [7] else []
    group = client.submit_group([([1], PARAMS), ([7], PARAMS)])
    with pytest.raises(RequestFailed, match="too odd") as caught:
        group.get(5)
    assert (caught.value.index, caught.value.status) == (1, 400)
    assert group.num_open == 1


def test_a_refused_group_fails_once_for_all(client: EngineClient, fake_engine) -> None:
    def refuse(submit: Submit) -> list[Failed]:
        ids = [one.request_id for one in fake_engine.submits]
        return [Failed(ids.pop(1), 503, "full", ids)] if submit.token_ids == [3] else []

    fake_engine.script = refuse
    group = client.submit_group([([1], PARAMS), ([2], PARAMS), ([3], PARAMS)])
    with pytest.raises(RequestFailed, match="full") as caught:
        group.get(5)
    assert (caught.value.index, caught.value.status, group.num_open) == (1, 503, 0)
    group.abort()
    assert fake_engine.aborts == []


def test_a_prompt_of_many_sequences_travels_once(client: EngineClient, fake_engine, monkeypatch) -> None:
    monkeypatch.setattr("pagegraph.runtime.ipc.connection.MAX_FRAME_BYTES", 30_000)
    prompt = list(range(100, 5100))
    group = client.submit_group([(prompt, PARAMS)] * 128)
    while group.num_open:
        assert group.get(5) is not None
    assert len(fake_engine.submits) == 128 and all(submit.token_ids == prompt for submit in fake_engine.submits)
    with pytest.raises(RequestFailed, match="above 30000; send fewer or shorter") as caught:
        client.submit_group([(prompt, PARAMS), (prompt[::-1], PARAMS), (prompt[1:], PARAMS)])
    assert caught.value.status == 400
    assert list(client.submit([1], PARAMS, timeout=5)), "the connection has lived on"


def test_engine_that_closes_ends_every_stream_at_once(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: []
    streams = [client.submit([1], PARAMS) for _ in range(3)]
    assert eventually(lambda: len(fake_engine.submits) == 3)
    started = time.monotonic()
    fake_engine.stop()
    for stream in streams:
        with pytest.raises(EngineDead):
            stream.get(5)
    assert time.monotonic() - started < 0.9  # well before the silence limit
    started = time.monotonic()
    with pytest.raises(EngineDead):
        client.submit([1], PARAMS)
    assert time.monotonic() - started < 0.2  # a dead engine is known to be dead


def test_silent_engine_is_dead_and_may_come_back(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: []
    stream = client.submit([1], PARAMS)
    assert eventually(lambda: fake_engine.submits)
    fake_engine.silent = True
    with pytest.raises(EngineDead, match="silent"):
        stream.get(5)
    fake_engine.silent = False
    assert client.info(timeout=5) == fake_engine.info


def test_what_was_given_up_is_aborted_when_the_engine_wakes(client: EngineClient, fake_engine) -> None:
    """It reads nothing while it is stalled; the requests before the stall are computed for nobody."""
    fake_engine.script = lambda s: []
    streams = [client.submit([1], PARAMS) for _ in range(3)]
    assert eventually(lambda: len(fake_engine.submits) == 3)
    fake_engine.stalled.set()
    for stream in streams:
        with pytest.raises(EngineDead, match="silent"):
            stream.get(5)
    assert fake_engine.aborts == []
    fake_engine.stalled.clear()
    assert eventually(lambda: len(fake_engine.aborts) == 3)
    assert sorted(fake_engine.aborts) == sorted(stream.request_id for stream in streams)


def test_what_was_given_up_while_nobody_was_there_is_aborted_on_the_next_contact(
    client: EngineClient, fake_engine
) -> None:
    """A connection can break between two that live on."""
    fake_engine.script = lambda s: []
    stream = client.submit([1], PARAMS)
    assert eventually(lambda: fake_engine.submits)
    fake_engine.stop()
    with pytest.raises(EngineDead):
        stream.get(5)
    second = type(fake_engine)(fake_engine.address, 99)
    assert eventually(lambda: second.aborts)
    second.stop()
    assert second.aborts == [stream.request_id]


def test_engine_that_says_it_died(client: EngineClient, fake_engine) -> None:
    fake_engine.script = lambda s: [Failed("", 503, "dead")]
    with pytest.raises(EngineDead):
        client.submit([1], PARAMS).get(5)


def test_no_engine_at_all(tmp_path) -> None:
    client = EngineClient(f"ipc://{tmp_path / 'nobody'}", silence_s=0.2)
    with pytest.raises(EngineDead):
        client.submit([1], PARAMS)
    client.close()


def test_a_new_engine_at_the_same_address_is_found(client: EngineClient, fake_engine) -> None:
    client.info()
    fake_engine.stop()
    second = type(fake_engine)(fake_engine.address, 99)
    second.script = lambda s: [TokenDelta(s.request_id, [3], "stop")]
    assert eventually(lambda: _vocab(client) == 99)
    assert [d.token_ids for d in client.submit([1], PARAMS, timeout=5)] == [[3]]
    second.stop()


class Successors:
    """Engines that follow one another at one address, and what tells a client whether another does."""

    def __init__(self, first) -> None:
        self.now = first
        self.follows = True

    def comeback(self) -> float | None:
        return 7.0 if self.follows else None

    def next(self, script) -> None:
        self.now.stop()
        self.now = type(self.now)(self.now.address, 99)
        self.now.script = script


@pytest.fixture
def successors(fake_engine) -> Iterator[Successors]:
    engines = Successors(fake_engine)
    yield engines
    engines.now.stop()


@pytest.fixture
def loyal(successors: Successors) -> Iterator[EngineClient]:
    """A client of engines that are followed by others."""
    address = successors.now.address
    client = EngineClient(address, heartbeat_s=0.05, silence_s=1.0, comeback=successors.comeback)
    yield client
    client.close()


def ends(submit: Submit) -> list[TokenDelta]:
    return [TokenDelta(submit.request_id, [submit.token_ids[0]], "length")]


def test_what_has_no_token_goes_to_the_next_engine_in_its_order(loyal: EngineClient, successors: Successors) -> None:
    successors.now.script = lambda s: [TokenDelta(s.request_id, [5])] if s.token_ids == [4] else []
    groups = [loyal.submit_group([([number], PARAMS), ([number], PARAMS)]) for number in range(7)]
    assert eventually(lambda: len(successors.now.submits) == 14)
    assert groups[4].get(5)[1].token_ids == [5]
    groups[2].abort()
    successors.next(ends)
    with pytest.raises(EngineDead) as dead:
        while True:
            groups[4].get(5)
    assert dead.value.retry_after_s == 7.0 and groups[4].num_open == 0
    for number in (0, 1, 3, 5, 6):
        assert [groups[number].get(5)[1].token_ids for _ in range(2)] == [[number]] * 2
    assert [submit.token_ids for submit in successors.now.submits] == [[n] for n in (0, 1, 3, 5, 6) for _ in range(2)]


def test_what_is_submitted_while_no_engine_is_there_is_refused(loyal: EngineClient, successors: Successors) -> None:
    loyal.info()
    successors.now.stop()
    assert eventually(lambda: _vocab(loyal) == 0)
    with pytest.raises(EngineDead) as dead:
        loyal.submit([1], PARAMS)
    assert dead.value.retry_after_s == 7.0


def test_a_client_that_never_heard_of_an_engine_does_not_wait_for_one_that_is_started(tmp_path) -> None:
    client = EngineClient(f"ipc://{tmp_path}/e.sock", silence_s=20.0, comeback=lambda: 7.0, is_started=lambda: True)
    asked = time.monotonic()
    with pytest.raises(EngineDead) as dead:
        client.submit([1], PARAMS)
    assert dead.value.retry_after_s == 7.0 and time.monotonic() - asked < 5
    client.close()


def test_what_an_engine_had_admitted_the_next_one_is_told_not_to_refuse(
    loyal: EngineClient, successors: Successors
) -> None:
    successors.now.script = lambda s: []
    admitted = loyal.submit_group([([1], PARAMS), ([1], PARAMS)])
    assert admitted.wait_admitted(5)
    successors.now.silent = True
    unanswered = loyal.submit_group([([2], PARAMS)])
    assert not unanswered.wait_admitted(0.3)
    assert successors.now.taken == [False]
    successors.next(ends)
    assert admitted.get(5)[1].token_ids == [1] and unanswered.get(5)[1].token_ids == [2]
    assert successors.now.taken == [True, False]


def test_what_was_lost_with_two_engines_is_given_up(loyal: EngineClient, successors: Successors) -> None:
    successors.now.script = lambda s: []
    stream = loyal.submit([1], PARAMS)
    assert eventually(lambda: successors.now.submits)
    successors.next(lambda s: [])
    assert eventually(lambda: successors.now.submits)
    successors.next(ends)
    with pytest.raises(RequestFailed, match="ended twice") as given_up:
        stream.get(5)
    assert given_up.value.status == 500
    assert eventually(lambda: successors.now.aborts) and not successors.now.submits


def test_whoever_waits_is_told_that_no_engine_follows(loyal: EngineClient, successors: Successors) -> None:
    successors.now.script = lambda s: []
    stream = loyal.submit([1], PARAMS)
    assert eventually(lambda: successors.now.submits)
    successors.now.stop()
    assert stream.get(0.5) is None
    successors.follows = False
    with pytest.raises(EngineDead) as dead:
        stream.get(5)
    assert dead.value.retry_after_s is None


def test_an_abort_while_no_engine_is_there_is_not_submitted_again(loyal: EngineClient, successors: Successors) -> None:
    successors.now.script = lambda s: []
    leaves, stays = loyal.submit([1], PARAMS), loyal.submit([2], PARAMS)
    assert eventually(lambda: len(successors.now.submits) == 2)
    successors.now.stop()
    assert eventually(lambda: _vocab(loyal) == 0)
    leaves.abort()
    successors.next(ends)
    assert stays.get(5).token_ids == [2]
    assert [submit.token_ids for submit in successors.now.submits] == [[2]]


def _vocab(client: EngineClient) -> int:
    try:
        return client.info(0.1).vocab_size
    except EngineDead:
        return 0


def test_a_forked_process_connects_anew(client: EngineClient) -> None:
    client.info()
    pid = os.fork()
    if pid == 0:
        try:
            deltas = list(client.submit([1], PARAMS, timeout=5))
            os._exit(0 if deltas[-1].finish_reason == "stop" else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(client.submit([1], PARAMS, timeout=5))
