"""The whole server as its users meet it: real processes, a real model, the official client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from openai import APIError, BadRequestError, OpenAI

from pagegraph.runtime.cli import main
from pagegraph.runtime.doctor.rules import RULES

QUESTIONS = [
    "What is the capital of France?", "Name a colour.", "What is 2 + 2?", "Say hello in Spanish.",
    "Who wrote Hamlet?", "What do bees make?", "Name a planet.", "What is ice?",
    "Give me a word that rhymes with cat.", "What is the largest ocean?", "Name a fruit.", "What is a haiku?",
    "How many legs has a spider?", "What does CPU stand for?", "Name a river.", "What is snow?",
]  # fmt: skip


class Server:
    """`runtime serve` on a free loopback port, uncompiled: what is tested here is not speed."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "pagegraph.runtime.cli", "serve", "configs/smollm2-cpu.yaml", "--port", "0",
                   "--dtype", "float32", "--compile", "false", "--max-model-len", "1024"]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait_for_url(time.monotonic() + 120)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def _wait_for_url(self, deadline: float) -> str:
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", "".join(self.lines)):
                return found[0]
            time.sleep(0.1)
        raise AssertionError("the server did not come up:\n" + "".join(self.lines))

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=120)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        return sum(
            float(value) for value in re.findall(rf"^pagegraph:{name}\{{[^}}]*\}} (\S+)$", self.get("/metrics"), re.M)
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)


def ask(client: OpenAI, question: str, **options) -> str:
    """A streamed answer, put together."""
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=12,
        stream=True,
        **options,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_the_doctor_reads_a_real_servers_metrics(server: Server) -> None:
    server.client().completions.create(model="smollm2", prompt="Once", max_tokens=4, temperature=0)
    result = CliRunner().invoke(main, ["doctor", server.url])
    assert result.exit_code == 0 and f"none of {len(RULES)} rules holds" in result.output, result.output


def test_sixteen_clients_at_once_get_the_serial_answers(server: Server) -> None:
    client = server.client()
    serial = [ask(client, question) for question in QUESTIONS[::3]]
    assert all(serial) and "Paris" in serial[0]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda question: ask(server.client(), question), QUESTIONS))
    assert together[::3] == serial and all(together)


def test_prefix_hits_are_counted_exactly(server: Server) -> None:
    client = server.client()
    prompt = list(range(1000, 1100))
    asked, hit = server.metric("prefix_cache_queries_total"), server.metric("prefix_cache_hits_total")
    cached = []
    for _ in range(2):
        answer = client.completions.create(model="smollm2", prompt=prompt, max_tokens=1, temperature=0)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 96]
    assert server.metric("prefix_cache_queries_total") - asked == 200
    assert server.metric("prefix_cache_hits_total") - hit == 96


def test_completions_options(server: Server) -> None:
    client = server.client()
    ask_for = dict(model="smollm2", prompt="The capital of France is", max_tokens=8, temperature=0)
    plain = client.completions.create(**ask_for, logprobs=3)
    choice = plain.choices[0]
    assert choice.finish_reason == "length" and plain.usage.completion_tokens == 8
    assert len(choice.logprobs.tokens) == 8 and all(len(top) >= 3 for top in choice.logprobs.top_logprobs)
    assert all(
        top[token] == max(top.values()) for token, top in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs)
    )
    stopped = client.completions.create(**ask_for, stop="Paris")
    assert stopped.choices[0].finish_reason == "stop" and "Paris" not in stopped.choices[0].text
    assert choice.text.startswith(stopped.choices[0].text)
    seeded = [
        client.completions.create(model="smollm2", prompt="Once", max_tokens=12, temperature=1.0, seed=5, n=2)
        for _ in range(2)
    ]
    texts = [[c.text for c in answer.choices] for answer in seeded]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_what_is_not_served_is_named(server: Server) -> None:
    client = server.client()
    with pytest.raises(BadRequestError, match="chat_template is not served"):
        ask(client, "hi", extra_body={"chat_template": "{{ messages }}"})
    raw = client.chat.completions.with_raw_response.create(
        model="smollm2", messages=[{"role": "user", "content": "hi"}], max_tokens=1, extra_body={"no_such_field": 1}
    )
    assert raw.headers["x-ignored-fields"] == "no_such_field"


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    stream = server.client().completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.metric("num_requests_running") == 1
    stream.close()
    deadline = time.monotonic() + 10
    while server.metric("num_requests_running") or server.metric("kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "the blocks of a client that left are still held"
        time.sleep(0.2)


def test_health(server: Server) -> None:
    server.get("/health/live")
    server.get("/health/ready")
    assert "smollm2" in server.get("/v1/models")


def test_an_engine_that_is_killed_ends_its_streams_and_is_replaced(server: Server) -> None:
    stream = server.client().completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = iter(stream)
    next(pieces)
    children = subprocess.run(
        ["pgrep", "-f", "pagegraph.runtime.server.engine_process"], capture_output=True, text=True
    ).stdout.split()
    (engine,) = [int(pid) for pid in children if _descends(int(pid), server.process.pid)]
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(APIError, match="engine is not running"):
        for _ in pieces:
            pass
    assert time.monotonic() - killed < 1.0
    patient = server.client().with_options(max_retries=10)
    assert "Paris" in ask(patient, QUESTIONS[0])


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return False
    return False


def test_sigterm_lets_streams_finish(server: Server) -> None:
    """The last of this file: the server is gone behind it."""
    stream = server.client().completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = iter(stream)
    next(pieces)
    server.process.send_signal(signal.SIGTERM)
    last = list(pieces)[-1]
    assert last.choices[0].finish_reason == "length"
    assert server.process.wait(40) == 0
