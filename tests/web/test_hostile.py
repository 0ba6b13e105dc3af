"""Hostile and careless clients by the hundred against a real supervisor and web process, over a fake engine.

Meanwhile a client asks ten times a second, and some read long streams. `pytest -s` prints what they saw.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pagegraph.runtime.server.child import child_environment
from tests.web.web_process import connect, eventually, read_to_end

# Prompts of one token; the engine answers 8 at once, 1 every twentieth of a second, and 1 very long one every fifth.
SHORT, STEADY, FLOOD = 20, 21, 22
NUM_STEADY = 4
SCENARIO_S = 15.0
SEND_TIMEOUT_S = 30.0  # the default

ENGINE = """
    import json, sys, time
    from pathlib import Path
    from pagegraph.runtime.ipc.mailbox import Mailbox
    from pagegraph.runtime.ipc.protocol import Abort, Admitted, EngineInfo, Hello, SubmitGroup, TokenDelta, Tokens

    settings = json.loads(Path(sys.argv[1]).read_text())
    model = Path(settings["config"]["model"])
    mailbox = Mailbox(settings["engine_address"], wait_ms=5)
    Path(sys.argv[1]).with_name("engine.json").write_text(json.dumps({"model_dir": str(model)}))
    open_ = {}  # (client, request id): first token of the prompt
    next_token, tick = 0.0, 0
    while True:
        for client, message in mailbox.poll(block=True):
            match message:
                case Hello():
                    draining = Path(settings["drain_flag"]).exists()
                    mailbox.send(client, EngineInfo(model="m", device="cpu", dtype="float32", vocab_size=LONG + 1,
                        max_model_len=512, num_blocks=9, block_size=16, compile_state="compiled", draining=draining, num_running=len(open_)))
                case SubmitGroup():
                    mailbox.send(client, Admitted(message.members[0].request_id))
                    for member in message.each():
                        first = member.token_ids[0]
                        if first == SHORT:
                            mailbox.send(client, Tokens([TokenDelta(member.request_id, [30] * 8, "length")]))
                        else:
                            open_[client, member.request_id] = first
                case Abort():
                    open_.pop((client, message.request_id), None)
        if time.monotonic() >= next_token:
            next_token, tick = time.monotonic() + 0.05, tick + 1
            for (client, request_id), first in list(open_.items()):
                if first == STEADY or tick % 4 == 0:
                    mailbox.send(client, Tokens([TokenDelta(request_id, [30 if first == STEADY else LONG])]))
"""

DRIVER = """
    import logging, sys
    from pagegraph.runtime.config import Config
    from pagegraph.runtime.server.supervisor import Supervisor
    folder, port = sys.argv[1:]
    logging.basicConfig(level="INFO")
    config = Config(model=folder, served_model_name="m", port=int(port), workers=1, drain_timeout_s=1)
    sys.exit(Supervisor(config, [sys.executable, folder + "/engine.py"]).run())
"""


@dataclass
class Server:
    """The supervisor and what it has printed."""

    port: int
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        return connect(self.port, 60, receive_buffer)

    def worker_rss(self) -> int:
        """Bytes of the web process: of gunicorn's child."""
        (master,) = (pid for pid in _descendants(self.process.pid) if "gunicorn" in _command(pid) and _children(pid))
        (worker,) = _children(master)
        return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * resource.getpagesize()


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def _descendants(pid: int) -> list[int]:
    return [found for child in _children(pid) for found in [child, *_descendants(child)]]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.fixture
def server(tokenizer_folder: Path, tmp_path: Path) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this process may not open the connections of all the clients")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    long_id = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][-1], "id": long_id, "content": "x" * 8000, "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    engine = textwrap.dedent(ENGINE)
    for name, token_id in {"SHORT": SHORT, "STEADY": STEADY, "FLOOD": FLOOD, "LONG": long_id}.items():
        engine = engine.replace(name, str(token_id))
    (folder / "engine.py").write_text(engine)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(folder), str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=child_environment())
    started = Server(port, process)
    threading.Thread(target=lambda: started.lines.extend(process.stderr), daemon=True).start()
    try:
        assert eventually(lambda: any("http://" in line for line in started.lines), 60), started.lines
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def request_of(first_token: int, max_tokens: int = 8, stream: bool = True) -> bytes:
    return _post("/v1/completions", {"prompt": [first_token], "max_tokens": max_tokens, "stream": stream})


def _post(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@dataclass
class Seen:
    """What the good clients saw: seconds of each request, failures, streams that ended, the worker's memory."""

    seconds: list[float]
    failed: list[bytes]
    ended_streams: int
    rss: int  # the most, in bytes

    @property
    def p99(self) -> float:
        return sorted(self.seconds)[int(0.99 * len(self.seconds))]


def watch(
    server: Server, attack: Callable[[ExitStack], None] = lambda stack: None, duration: float = SCENARIO_S
) -> Seen:
    """Ask gently and read streams for `duration` seconds while `attack` opens what it likes."""
    seen = Seen([], [], 0, 0)
    over = threading.Event()
    streams = [server.connect() for _ in range(NUM_STEADY)]

    def read(stream: socket.socket) -> None:
        stream.sendall(request_of(STEADY, 500))
        while not over.is_set():
            data = stream.recv(65536)
            if not data or b"[DONE]" in data or b'"error"' in data:
                seen.ended_streams += 1
                return

    def measure() -> None:
        while not over.wait(0.2):
            seen.rss = max(seen.rss, server.worker_rss())

    readers = [threading.Thread(target=read, args=(stream,)) for stream in streams] + [threading.Thread(target=measure)]
    for reader in readers:
        reader.start()
    with contextlib.ExitStack() as stack:
        attacking = threading.Thread(target=attack, args=(stack,))
        attacking.start()
        ends = time.monotonic() + duration
        while time.monotonic() < ends or attacking.is_alive():
            began = time.monotonic()
            with server.connect() as connection:
                connection.sendall(request_of(SHORT))
                answer = read_to_end(connection)
            seen.seconds.append(time.monotonic() - began)
            if b"[DONE]" not in answer:
                seen.failed.append(answer[:200])
            time.sleep(max(0.0, began + 0.1 - time.monotonic()))
        attacking.join()
    over.set()
    for reader in readers:
        reader.join()
    for stream in streams:
        stream.close()
    return seen


ExitStack = contextlib.ExitStack


def half_open(server: Server) -> Callable[[ExitStack], None]:
    """500 connections with half a head, half a body, or nothing."""
    whole = request_of(SHORT)
    parts = [b"", whole[:30], whole[:-5]]
    return lambda stack: (
        [stack.enter_context(server.connect()).sendall(parts[number % 3]) for number in range(500)] and None
    )


def never_read(server: Server) -> Callable[[ExitStack], None]:
    """200 streams that nobody reads."""
    return lambda stack: (
        [stack.enter_context(server.connect(4096)).sendall(request_of(FLOOD, 500)) for _ in range(200)] and None
    )


def idle(server: Server) -> Callable[[ExitStack], None]:
    """1,100 connections; every other one has asked once and is kept alive."""

    def open_all(stack: ExitStack) -> None:
        for number in range(1100):
            connection = stack.enter_context(server.connect())
            if number % 2:
                connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.003)  # what is measured is what they cost once they are there

    return open_all


def table(rows: dict[str, Seen]) -> None:
    print(f"\n{'':24}{'requests':>9}{'failed':>8}{'p50 ms':>8}{'p99 ms':>8}{'streams ended':>15}{'RSS MiB':>9}")
    for name, seen in rows.items():
        p50 = sorted(seen.seconds)[len(seen.seconds) // 2]
        asked = f"{len(seen.seconds):9}{len(seen.failed):8}{1e3 * p50:8.0f}{1e3 * seen.p99:8.0f}"
        print(f"{name:24}{asked}{seen.ended_streams:15}{seen.rss >> 20:9}")


def check(seen: Seen, quiet: Seen) -> None:
    """What holds under attack; a busy machine may make any request wait for some tenths of a second."""
    assert not seen.failed and not seen.ended_streams
    assert seen.rss < 2 * quiet.rss
    assert seen.p99 < max(3 * quiet.p99, 0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_careless_connections_harm_nobody(server: Server) -> None:
    quiet = watch(server)
    attacks = {"500 half open": half_open, "200 never read": never_read, "1,100 idle": idle}
    rows = {"idle server": quiet}
    for name, attack in attacks.items():
        rows[name] = watch(server, attack(server), SEND_TIMEOUT_S + 20 if attack is never_read else SCENARIO_S)

    def all_three(stack: ExitStack) -> None:
        for attack in attacks.values():
            attack(server)(stack)

    rows["all three"] = watch(server, all_three, SEND_TIMEOUT_S + 20)
    table(rows)
    assert sum("an answer was cut" in line for line in server.lines) == 400, "readers that never read were cut"
    for seen in rows.values():
        check(seen, quiet)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chats_of_megabytes_harm_nobody(server: Server) -> None:
    """Ten a second for 20 s, each refused for its length."""
    quiet = watch(server)
    chat = _post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello " * 1_300_000}], "max_tokens": 1}
    )

    def ask() -> bytes:
        with server.connect() as connection:
            connection.sendall(chat)
            return read_to_end(connection)

    answers: list[Future[bytes]] = []

    def ask_often(stack: ExitStack) -> None:
        with ThreadPoolExecutor(64) as threads:
            for _ in range(200):
                answers.append(threads.submit(ask))
                time.sleep(0.1)

    seen = watch(server, ask_often, 20)
    table({"idle server": quiet, "chats of 7.8 MB": seen})
    told = [answer.result()[:12] for answer in answers]
    print({status: told.count(status) for status in set(told)})
    assert set(told) == {b"HTTP/1.1 400"}
    check(seen, quiet)
