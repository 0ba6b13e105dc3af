"""The app under gunicorn as it is deployed, asked by the official client, over the fake engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pagegraph.runtime.ipc.protocol import TokenDelta
from tests.web.web_process import eventually, web_process

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def port(fake_engine, tokenizer_folder: Path, tmp_path: Path) -> Iterator[int]:
    """The port of one gunicorn worker with eight threads."""
    path = tmp_path / "settings.json"
    settings = {"engine_addresses": [fake_engine.address], "model": str(tokenizer_folder), "served_model_name": "tiny",
                "api_key": "key", "threads": 8, "enough_threads": 80, "keep_alive_s": 1.0}  # fmt: skip
    path.write_text(json.dumps(settings))
    with web_process(path, threads=8) as process:
        yield process.port


@pytest.fixture
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0, timeout=20)


def ask(port: int, request: bytes) -> bytes:
    """The first bytes of an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        return connection.recv(64)


def test_the_official_client(client: openai.OpenAI, port: int) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert whole.choices[0].message.content == "hello world"
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello world"
    assert chunks[-1].usage == whole.usage
    texts = client.completions.create(model="tiny", prompt="a", n=2, logprobs=1, extra_body={"min_p": 0.1})
    assert [choice.text for choice in texts.choices] == ["hello world"] * 2
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, logprobs=True) as events:
        assert events.get_final_completion().choices[0].message.content == "hello world"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="huge", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_sequences(port: int, fake_engine, stream: bool) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10])]
    body = json.dumps({"prompt": "a", "n": 2, "max_tokens": 100, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: len(fake_engine.submits) == 2)
        time.sleep(0.3)
        assert not fake_engine.aborts
    left = time.monotonic()
    assert eventually(lambda: len(fake_engine.aborts) == 2)
    assert time.monotonic() - left < 1.0


def test_probes_answer_while_every_place_is_taken(client: openai.OpenAI, port: int, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10])]
    streams = [client.completions.create(model="tiny", prompt="a", stream=True) for _ in range(4)]
    with pytest.raises(openai.InternalServerError, match="threads = 8"):
        client.completions.create(model="tiny", prompt="a")
    assert b"200" in ask(port, b"GET /health/ready HTTP/1.0\r\n\r\n")
    for stream in streams:
        stream.close()
    assert eventually(lambda: len(fake_engine.aborts) == 4)
    fake_engine.script = lambda s: fake_engine.deltas(s, [10])
    assert client.completions.create(model="tiny", prompt="a").choices[0].finish_reason == "stop"


def test_engine_death_reaches_the_client(client: openai.OpenAI, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10])]
    stream = client.completions.create(model="tiny", prompt="a", stream=True)
    assert eventually(lambda: fake_engine.submits)
    fake_engine.stop()
    with pytest.raises(openai.APIError, match="engine is not running"):
        list(stream)


def test_a_lagging_reader_does_not_slow_others(client: openai.OpenAI, port: int, fake_engine) -> None:
    normal = fake_engine.script
    fake_engine.script = lambda s: (
        [TokenDelta(s.request_id, [10] * 100) for _ in range(3000)] if s.token_ids[0] == 9 else normal(s)
    )
    body = json.dumps({"prompt": [9], "max_tokens": 100, "stream": True, "logprobs": 5}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: fake_engine.submits)
        started = time.monotonic()
        for _ in range(5):
            assert client.completions.create(model="tiny", prompt="a").choices[0].text == "hello world"
        assert time.monotonic() - started < 5
