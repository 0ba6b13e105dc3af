"""Several keys on a real server of two web processes: their limits, their turns and their prefix caches."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.server.served_model import ServedModel, served, tiny_model

LINES = "few requests_per_minute=3\ntokens tokens_per_minute=300\nat-once max_parallel_requests=2\nmany\none"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Iterator[ServedModel]:
    model = tiny_model(tmp_path_factory.mktemp("model"), tokenizer_folder)
    with served(model, step_s=0.01, max_num_seqs=4, max_queue=64, workers=2, api_key=LINES) as running:
        running.wait(lambda: len(running.web_pids) == 2)
        yield running


def ask(server: ServedModel, key: str, **body: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    answer = server.complete(key=key, **{"max_tokens": 2} | body)
    with contextlib.closing(answer):
        return answer.status, json.loads(answer.read()), {name.lower(): value for name, value in answer.headers.items()}


@contextlib.contextmanager
def only(server: ServedModel, which: int) -> Iterator[None]:
    """All that is asked meanwhile is answered by this one of the two web processes: the other stands still."""
    other = server.web_pids[1 - which]
    os.kill(other, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(other, signal.SIGCONT)


def test_web_processes_share_one_account_of_a_key(server: ServedModel) -> None:
    with only(server, 0):
        first, second = (ask(server, "few") for _ in range(2))
    with only(server, 1):
        third, fourth = (ask(server, "few") for _ in range(2))
    assert [status for status, _, _ in (first, second, third, fourth)] == [200, 200, 200, 429]
    remaining = [headers["x-ratelimit-remaining-requests"] for _, _, headers in (first, second, third, fourth)]
    assert remaining == ["2", "1", "0", "0"]
    _, body, headers = fourth
    assert body["error"]["code"] == "rate_limit_exceeded" and 10 < int(headers["retry-after"]) <= 20
    assert ask(server, "many")[0] == 200


def test_tokens_a_minute_of_a_real_answer(server: ServedModel) -> None:
    status, body, headers = ask(server, "tokens", max_tokens=200)
    assert status == 200 and headers["x-ratelimit-limit-tokens"] == "300"
    at_first, prompt = int(headers["x-ratelimit-remaining-tokens"]), body["usage"]["prompt_tokens"]
    assert at_first == 300 - prompt
    left = int(ask(server, "tokens")[2]["x-ratelimit-remaining-tokens"])
    assert 300 - 200 - 2 * prompt <= left <= 300 - 200 - 2 * prompt + 60  # five come back each second


def test_no_more_at_once_than_a_key_may(server: ServedModel) -> None:
    """And places are free again when answers end, or their clients leave."""
    streams = [server.complete(key="at-once", stream=True, max_tokens=3000) for _ in range(2)]
    try:
        assert [stream.status for stream in streams] == [200, 200] and ask(server, "at-once")[0] == 429
    finally:
        for stream in streams:
            stream.close()
    server.wait(lambda: ask(server, "at-once")[0] == 200)


def test_a_key_without_a_queue_passes_one_with(server: ServedModel) -> None:
    """Some hundred prompts of one key, more than may wait: the other's one is answered while most of them still wait."""
    done: list[float] = []
    statuses: list[int] = []
    lock = threading.Lock()

    def one_of_many(number: int) -> None:
        status = ask(server, "many", prompt=f"hello {number}", max_tokens=30)[0]
        with lock:
            statuses.append(status)
            done.append(time.monotonic())

    with ThreadPoolExecutor(100) as threads:
        asked = [threads.submit(one_of_many, number) for number in range(100)]
        server.wait(lambda: server.metric("num_requests_waiting") > 40)
        assert ask(server, "one", max_tokens=2)[0] == 200
        answered = time.monotonic()
        for future in asked:
            future.result()
    assert sum(at > answered for at in done) > 30 and set(statuses) == {200, 503}


def test_cached_tokens_do_not_tell_of_the_prompts_of_another_key(server: ServedModel) -> None:
    prompt = [20 + number % 50 for number in range(200)]

    def cached(key: str) -> int:
        return ask(server, key, prompt=prompt)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]

    with only(server, 0):
        assert cached("many") == 0
    with only(server, 1):
        assert cached("many") == 192 and cached("one") == 0 and cached("one") == 192
