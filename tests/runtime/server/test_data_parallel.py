"""data_parallel_size: a real server of two engines behind one address; the death of one is none of the other's business."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from pagegraph.runtime.cli import main
from pagegraph.runtime.config import ConfigError
from pagegraph.runtime.doctor.rules import Metrics
from pagegraph.runtime.llm import LLM
from tests.runtime.server.served_model import ServedModel, first_event, served, tiny_model

pytestmark = pytest.mark.timeout(300)

SLOTS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tokenizer_folder)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedModel]:
    with served(
        model,
        step_s=0.02,
        data_parallel_size=2,
        max_num_seqs=SLOTS,
        max_queue=4,
        api_key="a\nb\nfew requests_per_minute=3",
    ) as running:
        yield running


def ask(server: ServedModel, key: str = "a", **body: Any) -> tuple[int, dict[str, Any]]:
    with contextlib.closing(server.complete(key=key, **{"max_tokens": 2} | body)) as answer:
        return answer.status, json.loads(answer.read())


def steps(server: ServedModel) -> list[float]:
    return [server.metric("generation_tokens_total", engine) for engine in range(2)]


def test_a_conversation_stays_with_its_engine_and_strangers_take_turns(server: ServedModel) -> None:
    """Also where every turn is asked of the server as if for the first time; and no key finds what another's prompts left."""
    prompts = [[20 + (at * step) % 200 for at in range(120)] for step in (1, 3, 7, 11)]
    cached = []
    for prompt in prompts:
        status, answer = ask(server, prompt=prompt, key="a")
        assert status == 200
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0] * 4
    assert min(steps(server)) >= 2
    time.sleep(0.3)  # the web process is told within TELL_S
    for _ in range(2):
        for prompt in prompts:
            details = ask(server, prompt=[*prompt, 33, 34], key="a")[1]["usage"]["prompt_tokens_details"]
            assert details["cached_tokens"] == 112
    assert ask(server, prompt=prompts[0], key="b")[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_one_page_has_the_metrics_of_each_engine(server: ServedModel) -> None:
    text = server.get("/metrics", server.probe_port)[1].decode()
    families = [family for family in text_string_to_metric_families(text)]
    names = [family.name for family in families]
    assert len(names) == len(set(names))  # one line of type a name
    of = {family.name: family for family in families}
    for name in ("vllm:num_requests_running", "pagegraph:engine_up", "vllm:time_to_first_token_seconds"):
        assert {sample.labels["engine"] for sample in of[name].samples} == {"0", "1"}
    found = Metrics(text)
    assert found("generation_tokens_total") == sum(steps(server))
    assert 0 <= found.mean_of("kv_cache_usage_perc") <= 1
    assert found.quantile("e2e_request_latency_seconds", 0.5) <= found.quantile("e2e_request_latency_seconds", 0.99)
    assert server.get("/health", server.probe_port) == (200, b'{"status":"ready","engines":["ready","ready"]}')
    assert server.get("/health") == (200, b'{"status":"ready","engines":["ready","ready"]}')
    assert "[engine 1] engine 1 of 2 on cpu: 1 CPU threads of" in server.output


def test_places_and_queues_are_those_of_both(server: ServedModel) -> None:
    """Four run and eight wait: with one engine's more would be refused. The next one is."""
    streams = [server.complete(key="a", stream=True, max_tokens=2000) for _ in range(2 * SLOTS)]
    try:
        for stream in streams:
            first_event(stream)
        assert [server.metric("num_requests_running", engine) for engine in range(2)] == [SLOTS, SLOTS]
        with ThreadPoolExecutor(12) as threads:
            waiting = [threads.submit(ask, server, key, prompt=f"hello {key}") for key in "aaaabbbb"]
            server.wait(lambda: server.metric("num_requests_waiting") == 8)
            status, body = ask(server, prompt="one more")
            assert status == 503 and "queue is full" in body["error"]["message"]
            for stream in streams:
                stream.close()
            assert {future.result()[0] for future in waiting} == {200}
    finally:
        for stream in streams:
            stream.close()
    server.wait(lambda: server.metric("num_requests_running") == 0)


def test_the_limits_of_a_key_are_those_of_all_engines(server: ServedModel) -> None:
    before = steps(server)
    statuses = [ask(server, prompt=f"{number} of few", key="few")[0] for number in range(4)]
    assert statuses == [200, 200, 200, 429]
    assert all(now > then for now, then in zip(steps(server), before))  # both were asked


def rest(stream: http.client.HTTPResponse) -> str:
    with contextlib.closing(stream):
        return stream.read().decode()


def test_the_death_of_one_engine_ends_its_streams_alone_and_the_rest_goes_on(server: ServedModel) -> None:
    prompts = [f"{name} and so on" for name in ("one", "two", "three", "four")]
    streams = [server.complete(key="a", prompt=prompt, stream=True, max_tokens=150) for prompt in prompts]
    for stream in streams:
        first_event(stream)
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(ask, server, prompt=f"waits {number}", max_tokens=3) for number in range(4)]
        server.wait(lambda: server.metric("num_requests_waiting") == 4)
        lives, dies = server.engine_pids[0], server.engine_pids[1]
        os.kill(dies, signal.SIGKILL)
        ended = [threads.submit(rest, stream) for stream in streams]
        server.wait(lambda: b'"ready","engines":["ready","restarting"]' in server.get("/health", server.probe_port)[1])
        assert server.get("/health")[0] == 200
        assert {future.result()[0] for future in waiting} == {200}  # also those that find the other's queue full
        assert ask(server, prompt="meanwhile")[0] == 200
        texts = [future.result() for future in ended]
    cut = [text for text in texts if '"code":"engine_dead"' in text]
    assert len(cut) == SLOTS and all(text.rstrip().endswith("data: [DONE]") for text in texts)
    assert sum('"finish_reason":"length"' in text for text in texts) == SLOTS  # all 150 tokens of the others came
    server.wait(lambda: server.metric("engine_up", 1) == 1, 120)
    assert server.engine_pids[0] == lives and server.engine_pids[1] != dies
    assert [server.metric("engine_restarts_total", engine) for engine in range(2)] == [0, 1]
    before = steps(server)
    for number in range(6):
        assert ask(server, prompt=f"after it {number}")[0] == 200
    assert steps(server)[1] > before[1]  # the new one takes part


def test_a_drain_waits_for_the_streams_of_both(server: ServedModel) -> None:
    """The last that asks the server: it is gone behind it."""
    streams = [server.complete(key="a", prompt=f"drained {number}", stream=True, max_tokens=100) for number in range(4)]
    for stream in streams:
        first_event(stream)
    assert [server.metric("num_requests_running", engine) for engine in range(2)] == [2, 2]
    server.process.send_signal(signal.SIGTERM)
    server.wait(lambda: b'"draining","engines":["draining","draining"]' in server.get("/health", server.probe_port)[1])
    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(rest, streams))
    assert all('"finish_reason":"length"' in text for text in texts)
    assert server.process.wait(30) == 0


def test_what_runs_one_engine_says_so(model: Path) -> None:
    with pytest.raises(
        ConfigError, match="LLM runs one engine, and data_parallel_size=2, which is for runtime serve; set"
    ):
        LLM(str(model), data_parallel_size=2)
    for command in ("verify", "tune"):
        told = CliRunner().invoke(main, [command, str(model), "--data-parallel-size", "2"])
        assert told.exit_code and f"runtime {command} runs one engine, and data_parallel_size=2" in told.output
