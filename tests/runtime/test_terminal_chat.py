"""`runtime chat`: history, what is shown, errors; against a server that answers from a script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from pagegraph.runtime.cli import main
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
