"""What clients may do to a worker without harm to others: over real sockets, with the fake engine."""

from __future__ import annotations

import json
import random
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import tokenizers

from pagegraph.runtime.ipc.protocol import Submit, TokenDelta
from pagegraph.web.worker import LARGE_BODIES_BYTES, SMALL_BODY_BYTES, BodyBudget
from tests.conftest import FakeEngine
from tests.web.web_process import WebProcess, eventually, read_to_end, web_process

THREADS = 8
PLACES = THREADS // 2  # the routes leave the others to what is refused
HEADER_S, BODY_S, SEND_S = 1.5, 1.5, 1.0
ENDLESS, FLOOD = 7, 8  # first tokens of prompts that the engine answers in its own way
HEALTH = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeEngine]:
    """A fake engine that says " hello world", or what the first token of a prompt asks for."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    reply = [*backend.encode("hello world").ids, backend.token_to_id("<|end|>")]

    def answer(submit: Submit) -> list[TokenDelta]:
        if submit.token_ids[0] == ENDLESS:
            return [TokenDelta(submit.request_id, [10])]
        if submit.token_ids[0] == FLOOD:
            return [TokenDelta(submit.request_id, [10] * 100) for _ in range(6000)]
        return FakeEngine.deltas(submit, reply, stop_id=reply[-1])

    fake = FakeEngine(f"ipc://{tmp_path_factory.mktemp('engine') / 'socket'}", backend.get_vocab_size())
    fake.script = answer
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def web(engine: FakeEngine, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebProcess]:
    """A worker of few threads, with short time-outs."""
    path = tmp_path_factory.mktemp("web") / "settings.json"
    settings = {"engine_addresses": [engine.address], "model": str(tokenizer_folder), "served_model_name": "tiny",
                "threads": THREADS, "enough_threads": 80, "keep_alive_s": 0.2,
                "header_timeout_s": HEADER_S, "body_timeout_s": BODY_S,
                "send_timeout_s": SEND_S}  # fmt: skip
    path.write_text(json.dumps(settings))
    with web_process(path, threads=THREADS) as process:
        yield process


def completion(first_token: int = 20, stream: bool = False, connection: str = "close") -> bytes:
    body = json.dumps({"prompt": [first_token], "max_tokens": 100, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: {connection}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def error_of(answer: bytes, status: int) -> dict[str, str]:
    """The error in OpenAI's shape, from an answer of that status that says it closes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"Content-Type: application/json" in head, answer
    assert b"Connection: close" in head and b"content-length: %d" % len(body) in head.lower()
    return json.loads(body)["error"]


def read_to(connection: socket.socket, end: bytes) -> bytes:
    """What comes up to some bytes."""
    data = b""
    while not data.endswith(end):
        data += connection.recv(1)
    return data


def served(web: WebProcess) -> bool:
    return b"hello world" in web.ask(completion())


def test_half_requests_take_no_thread_and_end(web: WebProcess) -> None:
    head, body = completion().split(b"\r\n\r\n")
    with ExitStack() as stack:
        opened = [stack.enter_context(web.connect()) for _ in range(90)]
        sent = [b"", head[:40], head + b"\r\n\r\n" + body[:5]]
        for number, connection in enumerate(opened):
            connection.sendall(sent[number % 3])
        began = time.monotonic()
        assert served(web) and time.monotonic() - began < HEADER_S
        answers = [read_to_end(connection) for connection in opened]
        assert set(answers[0::3]) == {b""}
        assert {error_of(answer, 408)["message"] for answer in answers[1::3]} == {
            "the headers did not come within 1.5 s"
        }
        assert all("5 bytes of it arrived" in error_of(answer, 408)["message"] for answer in answers[2::3])


def test_dripping_headers_end_in_time(web: WebProcess) -> None:
    with web.connect() as connection:
        began = time.monotonic()
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() < began + 5 * HEADER_S:
            connection.sendall(b"G")
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                pass
        error_of(answer, 408)


def test_readers_that_never_read_are_cut(web: WebProcess, engine: FakeEngine) -> None:
    submits, aborts = len(engine.submits), len(engine.aborts)
    with ExitStack() as stack:
        for _ in range(PLACES):
            stack.enter_context(web.connect(receive_buffer=4096)).sendall(completion(FLOOD, stream=True))
        assert eventually(lambda: len(engine.submits) == submits + PLACES)
        assert b"200 OK" in web.ask(HEALTH.replace(b"Host", b"Connection: close\r\nHost")), (
            "probes have threads of their own"
        )
        assert eventually(lambda: len(engine.aborts) == aborts + PLACES, 20 * SEND_S)
        assert served(web)


def test_a_slow_reader_gets_all(web: WebProcess) -> None:
    with web.connect(receive_buffer=4096) as connection:
        connection.sendall(completion(FLOOD, stream=True))
        got = 0
        ends = time.monotonic() + 3 * SEND_S
        while time.monotonic() < ends:
            got += len(connection.recv(16384))
            time.sleep(0.02)
        assert got
        assert connection.recv(100), "its stream goes on"


def test_what_is_no_request_is_told_in_json(web: WebProcess) -> None:
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert "chunk header" in error_of(web.ask(chunked + b"ZZ\r\n"), 400)["message"]
    assert "content-length" in error_of(web.ask(chunked + b"2\r\n{}\r\n0\r\nContent-Length: 2\r\n\r\n"), 400)["message"]
    assert error_of(web.ask(b"nonsense\r\n\r\n"), 400)["type"] == "invalid_request_error"
    error_of(web.ask(b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 9000)), 414)
    error_of(web.ask(b"GET / HTTP/1.1\r\nHost: x\r\nX: %b\r\n\r\n" % (b"a" * 70000)), 431)
    error_of(web.ask(b"GET / HTTP/1.1\r\nHost: x\r\nExpect: more\r\n\r\n"), 417)
    error_of(web.ask(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"), 501)
    error_of(web.ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 505)
    too_large = completion().replace(b"Content-Length: ", b"Content-Length: 99999")
    assert "max_body_bytes" in error_of(web.ask(too_large.partition(b"{")[0]), 413)["message"]
    assert served(web)


def test_names_of_server_variables_in_headers_change_nothing(web: WebProcess) -> None:
    plain = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    for header in (b"SCRIPT_NAME: /v2", b"SCRIPT_NAME: /health", b"PATH_INFO: /none", b"REMOTE_USER: root"):
        assert web.ask(plain + header + b"\r\n\r\n").endswith(b'{"status":"ready"}')


def test_continue_pipelines_and_keep_alive(web: WebProcess) -> None:
    with web.connect() as connection:
        head, _, body = completion(connection="keep-alive").partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body + HEALTH + HEALTH[:9])
        answers = read_to(connection, b'"ready"}')
        assert answers.count(b"200 OK") == 2 and answers.index(b"hello world") < answers.index(b'"ready"')
        connection.sendall(HEALTH[9:])
        read_to(connection, b'"ready"}')
        connection.sendall(head + b"\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n" + body)
        assert b"hello world" in read_to_end(connection)


def test_idle_connections_make_room_for_new_ones(web: WebProcess) -> None:
    """The worker may open few more files: first idle connections fill them, then half requests."""
    before = resource.prlimit(web.worker, resource.RLIMIT_NOFILE)
    files = len(list(Path(f"/proc/{web.worker}/fd").iterdir())) + 20
    with ExitStack() as stack:
        kept = stack.enter_context(web.connect())
        kept.sendall(HEALTH)
        read_to(kept, b'"ready"}')
        resource.prlimit(web.worker, resource.RLIMIT_NOFILE, (files, before[1]))
        idle = [stack.enter_context(web.connect()) for _ in range(60)]
        assert served(web)
        assert kept.recv(1) == b"" and idle[0].recv(1) == b"", "the longest idle ones were closed"
        half = [stack.enter_context(web.connect()) for _ in range(60)]
        for connection in half:
            connection.sendall(HEALTH[:9])
        began = time.monotonic()
        assert served(web), "accepting goes on when the half requests have run into their time-out"
        assert time.monotonic() - began < 10 * HEADER_S
    resource.prlimit(web.worker, resource.RLIMIT_NOFILE, before)


def test_garbage_holds_no_thread(web: WebProcess, engine: FakeEngine) -> None:
    chance = random.Random(5)
    starts = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", completion().partition(b"{")[0], completion()[:-9]]
    with ExitStack() as stack:
        opened = [stack.enter_context(web.connect()) for _ in range(200)]
        for connection in opened:
            with suppress(ConnectionError):  # refused after the first bytes
                connection.sendall(chance.choice(starts))
                connection.sendall(chance.randbytes(chance.randint(1, 200)))
        submits = len(engine.submits)
        streams = [stack.enter_context(web.connect()) for _ in range(PLACES)]
        for stream in streams:
            stream.sendall(completion(ENDLESS, stream=True))
        assert eventually(lambda: sum(submit.token_ids[0] == ENDLESS for submit in engine.submits[submits:]) == PLACES)
        for stream in streams:
            stream.close()
        for answer in map(read_to_end, opened):
            assert not answer or answer.startswith(b"HTTP/1.1 400") or answer.startswith(b"HTTP/1.1 408"), answer
    assert served(web)


def test_a_stop_does_not_wait_for_half_requests(web: WebProcess, engine: FakeEngine) -> None:
    """The last test of this server."""
    submits = len(engine.submits)
    with ExitStack() as stack:
        for sent in (b"", HEALTH[:9], completion()[:-5]):
            stack.enter_context(web.connect()).sendall(sent)
        running = stack.enter_context(web.connect())
        running.sendall(completion(ENDLESS, stream=True))
        assert eventually(lambda: len(engine.submits) == submits + 1)
        web.master.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert read_to(running, b"keep-alive\n\n"), "the stream goes on"
        running.close()
        web.master.wait(20)
        assert time.monotonic() - asked < 8, "half requests and idle connections do not hold it up"


class Reading:
    """All that the budget sees of a connection."""

    def __init__(self, body_bytes: int) -> None:
        self.body_bytes, self.budget = body_bytes, 0


def test_large_bodies_take_turns() -> None:
    budget = BodyBudget(LARGE_BODIES_BYTES)
    bodies = [Reading(LARGE_BODIES_BYTES // 2) for _ in range(4)]
    small = Reading(SMALL_BODY_BYTES)
    assert [budget.acquire(body) for body in bodies] == [True, True, False, False]
    assert budget.acquire(small) and budget.acquire(bodies[0])
    assert budget.release(bodies[2]) == [], "it left before its turn"
    assert budget.release(bodies[0]) == [bodies[3]] and budget.acquire(bodies[3])
    assert budget.release(bodies[1]) == [] and budget.release(bodies[3]) == []
    whole = Reading(10 * LARGE_BODIES_BYTES)
    assert budget.acquire(whole) and not budget.acquire(bodies[0]) and budget.release(whole) == [bodies[0]]
