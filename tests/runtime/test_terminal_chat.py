"""`runtime chat`: history, what is shown, errors; against a server that answers from a script."""

from __future__ import annotations

import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from pagegraph.runtime.cli import main
from pagegraph.runtime.commands.chat import _printable, _written
from pagegraph.runtime.terminal_chat import Answer, ChatError, TerminalChat
from tests.runtime.bench.fake_server import FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def talk(server: FakeServer, **more: Any) -> TerminalChat:
    return TerminalChat(server.url, params={"max_tokens": 3}, **more)


def test_an_answer_streams_and_is_remembered(server: FakeServer) -> None:
    chat, shown = talk(server, system="Be brief."), []
    answer = chat.say("Hello there", lambda text, is_reasoning: shown.append((text, is_reasoning)))
    assert shown == [(" w0", False), (" w1", False), (" w2", False)]
    assert (answer.text, answer.tokens, answer.prompt_tokens) == (" w0 w1 w2", 3, 4)
    chat.say("And?", lambda text, is_reasoning: None)
    assert server.bodies[1]["model"] == "fake"
    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": " w0 w1 w2"},
        {"role": "user", "content": "And?"},
    ]


def test_another_answer_takes_the_place_of_the_last(server: FakeServer) -> None:
    chat = talk(server)
    for text in ("One", "Two"):
        chat.say(text, lambda text, is_reasoning: None)
    chat.again(lambda text, is_reasoning: None)
    assert server.bodies[2]["messages"] == server.bodies[1]["messages"] and len(chat.messages) == 4
    server.fails = lambda body: True
    with pytest.raises(ChatError):
        chat.again(lambda text, is_reasoning: None)
    assert len(chat.messages) == 4
    with pytest.raises(ChatError, match="no message"):
        talk(server).again(lambda text, is_reasoning: None)


def test_ctrl_c_ends_an_answer_and_keeps_what_came(server: FakeServer) -> None:
    def show(text: str, is_reasoning: bool) -> None:
        if text == " w1":
            raise KeyboardInterrupt

    chat = talk(server)
    answer = chat.say("Hello", show)
    assert answer.stopped and str(answer) == "stopped"
    assert chat.messages[-1] == {"role": "assistant", "content": " w0 w1"}


def test_errors_are_for_people_and_leave_the_history(server: FakeServer) -> None:
    chat = talk(server)
    server.fails = lambda body: True
    with pytest.raises(ChatError, match="500"):
        chat.say("Hello", lambda text, is_reasoning: None)
    assert chat.messages == []
    with pytest.raises(ChatError, match="does not answer .*; is `runtime serve` running there"):
        TerminalChat("http://127.0.0.1:1").find_model()


@contextmanager
def answering(head: bytes, body: bytes) -> Iterator[str]:
    """The URL of a server that answers every request with these bytes and closes the connection."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            lines = [*iter(self.rfile.readline, b"\r\n")]
            lengths = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")]
            self.rfile.read(sum(lengths))
            self.wfile.write(head + b"\r\n\r\n" + body)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked"
PLAIN = b"HTTP/1.0 200 OK"
EVENT = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'


@pytest.mark.parametrize(
    ("head", "body", "reason"),
    [
        (CHUNKED, b"40\r\n" + EVENT[:20], "broke off"),
        (CHUNKED, b"%x\r\n%b\r\n" % (len(EVENT), EVENT), "broke off"),
        (PLAIN, EVENT, "before its end"),
        (PLAIN, b"data: {oops\n\n", "an event that is no JSON: '{oops'"),
        (PLAIN, b"data: [1]\n\n", "an event that is none of this protocol: \\[1\\]"),
        (PLAIN, b'data: {"usage": {"total_tokens": 3}}\n\n', "an event that is none of this protocol"),
        (b"220 mail.example ESMTP", b"", "does not answer"),
    ],
)
def test_a_server_that_dies_or_talks_otherwise_is_an_error_for_people(head: bytes, body: bytes, reason: str) -> None:
    with answering(head, body) as url, pytest.raises(ChatError, match=reason):
        TerminalChat(url, model="m").say("Hello", lambda text, is_reasoning: None)


def test_models_of_another_shape_are_an_error_for_people() -> None:
    with answering(PLAIN, b'["a"]') as url, pytest.raises(ChatError, match="lists its models as no server"):
        TerminalChat(url).find_model()


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a", "http://a b", "http://127.0.0.1:1/\N{SNOWMAN}"])
def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    with pytest.raises(ChatError, match="is no URL .*; for example http://127.0.0.1:8000"):
        TerminalChat(url).find_model()


@pytest.mark.parametrize("key", ["a\nb", "\N{SNOWMAN}", "\udcff"])
def test_a_key_that_no_header_can_carry(server: FakeServer, key: str) -> None:
    with pytest.raises(ChatError, match="printable ASCII"):
        talk(server, api_key=key).find_model()


def test_a_message_whose_answer_failed_is_said_again(server: FakeServer) -> None:
    chat = talk(server)
    chat.say("One", lambda text, is_reasoning: None)
    server.fails = lambda body: True
    with pytest.raises(ChatError):
        chat.say("Two", lambda text, is_reasoning: None)
    with pytest.raises(ChatError):
        chat.again(lambda text, is_reasoning: None)
    server.fails = lambda body: False
    chat.again(lambda text, is_reasoning: None)
    assert [message["content"] for message in chat.messages] == ["One", " w0 w1 w2", "Two", " w0 w1 w2"]
    server.fails = lambda body: True
    with pytest.raises(ChatError):
        chat.say("Three", lambda text, is_reasoning: None)
    chat.forget()
    with pytest.raises(ChatError, match="no message"):
        chat.again(lambda text, is_reasoning: None)


def test_what_is_said_commands_no_terminal() -> None:
    assert _printable("a\tb\nc\x1b[2J\x9b1m \N{SNOWMAN}") == "a\tb\nc\ufffd[2J\ufffd1m \N{SNOWMAN}"


def test_an_address_without_its_scheme() -> None:
    found = CliRunner().invoke(main, ["chat", "localhost:8000"])
    assert found.exit_code == 2 and "did you mean http://localhost:8000?" in found.stderr


def test_what_another_process_has_written() -> None:
    with tempfile.TemporaryFile() as log:
        for word in ("one", "two"):
            subprocess.run([sys.executable, "-c", f"print('{word}')"], stdout=log, check=True)
            assert _written(log.fileno()).endswith(f"{word}\n")
        assert _written(log.fileno()) == "one\ntwo\n"


def test_the_key_is_sent(server: FakeServer) -> None:
    talk(server, api_key="s3cret").say("Hello", lambda text, is_reasoning: None)
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


def test_figures() -> None:
    answer = Answer("text", first_s=0.5, seconds=2.5, prompt_tokens=51, cached_tokens=48, tokens=21)
    assert str(answer) == "21 tokens, 10.0 tokens/s, first after 0.50 s; prompt 51, 48 of it cached"
    assert str(Answer()) == ""


def test_the_command(server: FakeServer) -> None:
    flags = ["--max-tokens", "2", "--temperature", "0"]
    found = CliRunner().invoke(main, ["chat", server.url + "/v1/", *flags, "-q", "Hello"])
    assert (found.exit_code, found.stdout) == (0, " w0 w1\n")
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 2
    lines = "Hello\n\n/system Be kind.\nAnd?\n/retry\n/new\nAgain\n/nonsense\n/quit\nNever\n"
    found = CliRunner().invoke(main, ["chat", server.url, *flags], input=lines)
    assert (found.exit_code, found.stdout) == (0, " w0 w1\n" * 4)
    assert "/new begins anew" in found.stderr
    said = [[message["content"] for message in body["messages"]] for body in server.bodies[1:]]
    assert said == [["Hello"], second := ["Be kind.", "Hello", " w0 w1", "And?"], second, ["Be kind.", "Again"]]


def test_the_command_fails_with_a_reason(server: FakeServer) -> None:
    server.fails = lambda body: True
    found = CliRunner().invoke(main, ["chat", server.url, "-q", "Hello"])
    assert found.exit_code == 1 and "500" in found.stderr
    found = CliRunner().invoke(main, ["chat", "http://127.0.0.1:1"], input="Hello\n")
    assert found.exit_code == 1 and "does not answer" in found.stderr
