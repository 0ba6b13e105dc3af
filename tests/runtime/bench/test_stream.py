"""One answer, fed by hand and timed by a clock of the test: times, text and counts, and every way in which it fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.runtime.bench.outcome import Outcome
from pagegraph.runtime.bench.stream import Stream, Target, send

USAGE = {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5}}


class Transport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.written, self.closed = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True


def answer(pieces: Iterable[tuple[float, bytes]], *, lost: bool = False) -> Outcome:
    """What a stream makes of bytes that come at these times; it is sent at 100."""

    async def fed() -> Outcome:
        now = [100.0]
        stream = Stream(b"request", clock=lambda: now[0])
        transport = Transport()
        stream.connection_made(transport)
        for now[0], data in pieces:
            stream.data_received(data)
        if lost:
            stream.connection_lost(None)
        assert stream.ended.done() and transport.written == b"request" and transport.closed
        return stream.outcome

    return asyncio.run(fed())


def head(status: int = 200, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", "Content-Type: text/event-stream", *lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(value: dict | str) -> bytes:
    return b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode() + b"\n\n"


def text(text: str, reason: str | None = None) -> dict:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def delta(reason: str | None = None, **delta: object) -> dict:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


CHUNKED = head(200, "Transfer-Encoding: chunked")
END = chunk(event("[DONE]")) + b"0\r\n\r\n"


def test_times_of_a_completion() -> None:
    found = answer([
        (100.5, CHUNKED), (101.0, chunk(event(text("a")))), (101.25, chunk(event(text("b")))),
        (101.75, chunk(event(text("", "length")))), (102.0, chunk(event(USAGE)) + END),
    ])  # fmt: skip
    assert (found.start_time, found.ttft, found.itl, found.latency) == (100.0, 1.0, [0.25], 1.25)
    assert (found.text, found.prompt_len, found.output_tokens, found.has_usage, found.error) == ("ab", 11, 5, True, "")
    assert found.tpot == 0.25 / 4


def test_a_chats_first_sign_is_its_first_word_and_no_role() -> None:
    found = answer([
        (100.1, CHUNKED), (100.2, chunk(event(delta(role="assistant", content="")))),
        (101.0, chunk(event(delta(reasoning_content="so")))), (102.0, chunk(event(delta(content="yes")))),
        (104.0, chunk(event(delta(tool_calls=[{"index": 0}])))), (105.0, chunk(event(delta("stop"))) + END),
    ])  # fmt: skip
    assert (found.ttft, found.itl, found.latency, found.text) == (1.0, [1.0, 2.0], 4.0, "soyes")
    assert not found.has_usage and found.output_tokens == 3  # without a usage events count


def test_tokens_without_a_character_yet_are_output() -> None:
    found = answer([(100.0, CHUNKED), (101.0, chunk(event(text("")))), (103.0, chunk(event(text("é"))) + END)])
    assert (found.ttft, found.itl) == (1.0, [2.0])


def test_an_answer_of_no_text_is_one() -> None:
    found = answer([(100.0, CHUNKED), (101.0, chunk(event(delta("stop"))) + END)])
    assert found.success and (found.ttft, found.latency, found.output_tokens) == (1.0, 1.0, 0)


@given(st.lists(st.integers(1, 400), max_size=12))
def test_bytes_may_be_cut_anywhere(cuts: list[int]) -> None:
    whole = (
        CHUNKED + chunk(event(text("a")) + event(text("é"))[:9]) + chunk(event(text("é"))[9:]) + chunk(b": ping\n\n")
    )
    whole += chunk(event(text("c", "stop")).replace(b"\n", b"\r\n")) + chunk(event(USAGE)) + END
    places = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    pieces = [(101.0, whole[begin:end]) for begin, end in zip(places, places[1:])]
    found = answer(pieces)
    assert (found.text, found.error, found.itl, found.output_tokens) == ("aéc", "", [0.0, 0.0], 5)


@pytest.mark.parametrize("lines, ending", [(["Content-Length: {}"], b""), (["Connection: close"], b"lost")])
def test_bodies_without_chunks(lines: list[str], ending: bytes) -> None:
    body = event(text("a", "stop"))
    found = answer([(101.0, head(200, *[line.format(len(body)) for line in lines]) + body)], lost=bool(ending))
    assert found.success and found.text == "a"


@pytest.mark.parametrize(
    "data, told",
    [
        (head(503, "Content-Length: 5") + b"later", "HTTP 503: later"),
        (head(200, "Content-Length: 12") + b'{"error": 1}', 'without output: {"error": 1}'),
        (CHUNKED + chunk(event(text("a"))) + chunk(event({"error": {"message": "no blocks"}})), "no blocks"),
        (CHUNKED + chunk(event("{")), "OpenAI protocol"),
        (CHUNKED + chunk(event('{"choices": 3}')), "OpenAI protocol"),
        (CHUNKED + END, "without output"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "OpenAI protocol"),
        (CHUNKED + chunk(event(text("a"))), "peer closed connection"),
        (b"", "ended within the answer"),
    ],
)
def test_what_is_no_whole_answer_fails(data: bytes, told: str) -> None:
    found = answer([(101.0, data)] if data else [], lost=True)
    assert not found.success and told in found.error


def test_the_request() -> None:
    target = Target("http://127.0.0.1:8000/v1/completions?x=1", {"Authorization": "Bearer k", "Host": "other"})
    server = h11.Connection(h11.SERVER)
    server.receive_data(target.request(b"{}"))
    request = server.next_event()
    assert isinstance(request, h11.Request) and (request.method, request.target) == (b"POST", b"/v1/completions?x=1")
    headers = dict(request.headers)
    assert headers[b"authorization"] == b"Bearer k" and headers[b"host"] == b"127.0.0.1:8000"
    assert not target.is_chat and Target("https://h/v1/chat/completions").is_chat


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/", "http://"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        Target(url)


def test_nobody_listens() -> None:
    found = asyncio.run(send(Target("http://127.0.0.1:1/v1/completions"), None, b"{}", 5.0))
    assert "no connection to 127.0.0.1:1" in found.error
