"""The engine's socket end: junk is counted, a lost client becomes aborts, nobody blocks the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagegraph.runtime.ipc.mailbox import Mailbox
from pagegraph.runtime.ipc.protocol import (
    Abort,
    Failed,
    Hello,
    Member,
    SamplingParams,
    Submit,
    SubmitGroup,
    TokenDelta,
    Tokens,
    decode_to_client,
    encode,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mailbox(tmp_path: Path, clock: Clock) -> Iterator[Mailbox]:
    box = Mailbox(f"ipc://{tmp_path / 'socket'}", wait_ms=50, send_high_water=4, clock=clock)
    yield box
    box.close()


@pytest.fixture
def client(tmp_path: Path, mailbox: Mailbox) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVHWM, 4)
    dealer.setsockopt(zmq.IDENTITY, b"web")
    dealer.connect(f"ipc://{tmp_path / 'socket'}")
    yield dealer
    dealer.close()
    context.term()


def take(mailbox: Mailbox, count: int = 1) -> list[tuple[bytes, object]]:
    got: list[tuple[bytes, object]] = []
    for _ in range(40):
        got += mailbox.poll(block=True)
        if len(got) >= count:
            break
    return got


def submit(request_id: str = "r") -> Submit:
    return Submit(request_id=request_id, token_ids=[1, 2], params=SamplingParams())


def test_blocking_poll_returns_in_bounded_time(mailbox: Mailbox) -> None:
    started = time.monotonic()
    assert mailbox.poll(block=True) == []
    assert 0.03 < time.monotonic() - started < 1
    started = time.monotonic()
    assert mailbox.poll(block=False) == [] and time.monotonic() - started < 0.03


def test_messages_both_ways(mailbox: Mailbox, client: zmq.Socket[bytes]) -> None:
    client.send(encode(submit()))
    assert take(mailbox) == [(b"web", submit())]
    tokens = Tokens([TokenDelta("r", [5], "stop")])
    assert mailbox.send(b"web", tokens)
    assert decode_to_client(client.recv()) == tokens


def test_malformed_frames_are_counted_and_dropped(mailbox: Mailbox, client: zmq.Socket[bytes]) -> None:
    client.send(b"\x80\x04K\x01.")
    client.send(b"")
    client.send_multipart([encode(Hello()), b"more"])
    client.send(encode(Tokens([])))
    client.send(b"\x91" * 100_000)
    client.send(encode(Hello()))
    assert take(mailbox) == [(b"web", Hello())]
    assert mailbox.malformed == 5


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(frames=st.lists(st.binary(max_size=64), min_size=1, max_size=4))
def test_random_frames_harm_nothing(mailbox: Mailbox, client: zmq.Socket[bytes], frames: list[bytes]) -> None:
    client.send_multipart(frames)
    client.send(encode(Abort("end")))
    assert (b"web", Abort("end")) in take(mailbox)


def test_a_client_that_stops_reading_loses_its_requests(mailbox: Mailbox, client: zmq.Socket[bytes]) -> None:
    client.send(encode(submit("slow")))
    take(mailbox)
    big = Tokens([TokenDelta("slow", list(range(70_000, 100_000)))])
    started = time.monotonic()
    sent = 0
    while mailbox.send(b"web", big):
        sent += 1
        assert sent < 1000
    assert time.monotonic() - started < 5
    assert mailbox.poll(block=False) == [(b"web", Abort("slow"))]
    assert mailbox.lost_clients == 1


def test_a_silent_client_is_lost_and_told_when_it_speaks(
    mailbox: Mailbox, client: zmq.Socket[bytes], clock: Clock
) -> None:
    client.send(encode(submit("a")))
    client.send(encode(submit("done")))
    take(mailbox, 2)
    mailbox.send(b"web", Tokens([TokenDelta("done", [1], "length")]))
    client.recv()
    clock.now = 11.0
    assert mailbox.poll(block=False) == []
    clock.now = 12.0
    assert mailbox.poll(block=False) == [(b"web", Abort("a"))]
    client.send(encode(Hello()))
    take(mailbox)
    assert decode_to_client(client.recv()) == Tokens()
    failed = decode_to_client(client.recv())
    assert isinstance(failed, Failed) and (failed.request_id, failed.status) == ("a", 503)


def test_a_client_that_ended_is_lost_with_the_first_heartbeat_that_it_misses(
    mailbox: Mailbox, client: zmq.Socket[bytes], clock: Clock
) -> None:
    client.send(encode(submit("a")))
    take(mailbox)
    client.close(linger=0)
    got = []
    while not got and clock.now < 4:
        clock.now += 0.5
        got = mailbox.poll(block=True)
    assert got == [(b"web", Abort("a"))] and clock.now <= 3


def test_a_client_whose_heartbeats_have_not_been_read_yet_after_a_stall_is_not_lost(
    mailbox: Mailbox, client: zmq.Socket[bytes], clock: Clock
) -> None:
    """ZeroMQ's own thread stood still as well: the first look finds nothing of what came meanwhile."""
    client.send(encode(submit("a")))
    take(mailbox)
    clock.now = 31.0
    assert mailbox.poll(block=False) == []
    client.send(encode(Hello()))
    assert take(mailbox) == [(b"web", Hello())]
    clock.now = 40.0
    assert mailbox.poll(block=False) == [] and mailbox.lost_clients == 0


def test_a_client_whose_heartbeats_wait_behind_a_backlog_is_not_lost(
    mailbox: Mailbox, client: zmq.Socket[bytes], clock: Clock, monkeypatch
) -> None:
    """After a stall of the engine's own, nobody is silent of whom not all has been read."""
    client.send(encode(submit("a")))
    take(mailbox)
    monkeypatch.setattr("pagegraph.runtime.ipc.mailbox._MAX_FRAMES_A_POLL", 2)
    for _ in range(4):
        client.send(b"junk")
    client.send(encode(Hello()))
    clock.now = 31.0
    got = []
    while not got:
        got = mailbox.poll(block=True)
    assert got == [(b"web", Hello())] and mailbox.lost_clients == 0


GROUP = SubmitGroup(prompts=[[1, 2]], members=[Member(name, 0, SamplingParams()) for name in "abc"])


def test_a_group_is_lost_whole(mailbox: Mailbox, client: zmq.Socket[bytes], clock: Clock) -> None:
    client.send(encode(GROUP))
    assert take(mailbox) == [(b"web", GROUP)] and [one.token_ids for one in GROUP.each()] == [[1, 2]] * 3
    clock.now = 11.0
    assert mailbox.poll(block=False) == []
    clock.now = 12.0
    assert {message.request_id for _, message in mailbox.poll(block=False)} == set("abc")


def test_a_group_is_refused_whole(mailbox: Mailbox, client: zmq.Socket[bytes], clock: Clock) -> None:
    client.send(encode(GROUP))
    take(mailbox)
    mailbox.send(b"web", Failed("b", 503, "full", ["a", "c"]))
    clock.now = 11.0
    assert mailbox.poll(block=False) == []
    clock.now = 12.0
    assert mailbox.poll(block=False) == []


@pytest.mark.parametrize("members", [[], [["a", 1, {}]], [["a", 0, {}], ["b", -1, {}]]])
def test_a_group_without_its_prompt_is_malformed(mailbox: Mailbox, client: zmq.Socket[bytes], members: list) -> None:
    for those in (members, [["a", 0, {}]]):
        client.send(msgspec.msgpack.encode({"type": "submit_group", "prompts": [[1]], "members": those}))
    group = SubmitGroup(prompts=[[1]], members=[Member("a", 0, SamplingParams())])
    assert take(mailbox) == [(b"web", group)] and mailbox.malformed == 1


def test_an_unknown_client_is_no_error(mailbox: Mailbox) -> None:
    assert not mailbox.send(b"nobody", Failed("x", 500, "y"))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5555", "ipc://relative", "ipc:///tmp/" + "x" * 120])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Mailbox(address)


def test_folder_is_private(tmp_path: Path) -> None:
    Mailbox(f"ipc://{tmp_path / 'new' / 's'}").close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="755"):
        Mailbox(f"ipc://{tmp_path / 'open' / 's'}")
