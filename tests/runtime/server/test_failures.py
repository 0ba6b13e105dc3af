"""What clients of a real server meet when something fails: an engine, a step, a request, a web process, a client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.runtime.server.faulty_engine import POISONED, WEDGED
from tests.runtime.server.served_model import ServedModel, first_event, served, tiny_model

SLOTS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tokenizer_folder)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedModel]:
    """Slow enough for clients to leave in every state."""
    with served(model, step_s=0.02, max_num_seqs=SLOTS, max_num_batched_tokens=64) as running:
        yield running


Answer = tuple[int, list[str], list[float]]


def with_one_poisoned(server: ServedModel) -> tuple[list[Answer], list[Answer]]:
    """(status, tokens, log-probabilities) of eight requests at once, and of the same ones with the sixth poisoned."""

    def ask(number: int, seed: int) -> Answer:
        answer = server.complete(
            prompt=list(range(10, 20 + number)), max_tokens=30, seed=seed, logprobs=1, temperature=1
        )
        body = json.loads(answer.read())
        if answer.status != 200:
            return answer.status, [], []
        told = body["choices"][0]["logprobs"]
        return 200, told["tokens"], told["token_logprobs"]

    seeds = list(range(SLOTS))
    with ThreadPoolExecutor(SLOTS) as threads:
        clean = list(threads.map(ask, range(SLOTS), seeds))
        seeds[5] = POISONED
        troubled = list(threads.map(ask, range(SLOTS), seeds))
    assert [status for status, *_ in troubled] == [500 if number == 5 else 200 for number in range(SLOTS)]
    assert server.metric("engine_restarts_total") == 0
    server.wait(server.free)
    del clean[5], troubled[5]
    return clean, troubled


def test_a_poisoned_request_of_eight_ends_alone(server: ServedModel) -> None:
    """The others' tokens and log-probabilities are those of a run without it."""
    for (_, tokens, logprobs), (_, tokens_beside, logprobs_beside) in zip(*with_one_poisoned(server)):
        assert tokens_beside == tokens
        assert logprobs_beside == pytest.approx(logprobs, abs=1e-5)  # of batches of other sizes


@pytest.mark.slow
def test_with_deterministic_the_others_have_the_same_bits(model: Path) -> None:
    with served(
        model, step_s=0.02, max_num_seqs=SLOTS, max_num_batched_tokens=64, deterministic=True, compile=True
    ) as server:
        clean, troubled = with_one_poisoned(server)
        assert troubled == clean


@pytest.mark.parametrize("state", ["queued", "prefilling", "decoding"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_all_it_held(server: ServedModel, state: str, stream: bool) -> None:
    before = server.metric("request_success_total")
    company = [server.complete(max_tokens=4000, stream=True) for _ in range(SLOTS if state == "queued" else 1)]
    for one in company:
        first_event(one)
    body = {"prompt": list(range(10, 310)) * 8 if state == "prefilling" else "hello", "max_tokens": 1000}
    leaves = server.leaving(**body, stream=stream)
    name = "num_requests_waiting" if state == "queued" else "num_requests_running"
    server.wait(lambda: server.metric(name) == (1 if state == "queued" else 2))
    if state == "decoding":
        time.sleep(0.3)
    leaves.close()
    left = server.wait(lambda: server.metric(name) == (0 if state == "queued" else 1), 2.0)
    assert left < 1.5
    for one in company:
        one.close()
    server.wait(server.free)
    assert server.metric("request_success_total") == before + len(company) + 1


def test_a_background_response_outlives_its_client_and_its_cancel_frees_it(server: ServedModel) -> None:
    def begin(**body: object) -> str:
        answer = server.post("/v1/responses", input="hello", background=True, **body)
        told = json.loads(answer.read())
        answer.close()
        return told["id"]

    def status(id: str) -> str:
        return json.loads(server.get(f"/v1/responses/{id}")[1])["status"]

    short, long = begin(max_output_tokens=16), begin(max_output_tokens=4000)
    server.wait(lambda: status(short) in ("completed", "incomplete"))
    server.post(f"/v1/responses/{long}/cancel").close()
    server.wait(server.free)
    assert status(long) == "cancelled"


SURFACES = {
    "/v1/completions": ({"prompt": "hello", "max_tokens": 4000, "ignore_eos": True}, '"code":"engine_dead"'),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3000, "ignore_eos": True},
        '"code":"engine_dead"',
    ),
    "/v1/responses": ({"input": "hello", "max_output_tokens": 3000, "ignore_eos": True}, '"type":"response.failed"'),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3000, "ignore_eos": True},
        '"type":"overloaded_error"',
    ),
}


@pytest.mark.slow
def test_a_killed_engine_ends_every_surface_in_its_own_form_and_is_replaced(model: Path) -> None:
    with served(model, step_s=0.01, max_num_seqs=SLOTS) as server, ThreadPoolExecutor(16) as threads:
        streams = {path: server.post(path, stream=True, **body) for path, (body, _) in SURFACES.items()}
        background = json.loads(server.post("/v1/responses", **SURFACES["/v1/responses"][0], background=True).read())
        for one in streams.values():
            first_event(one)
        whole = [threads.submit(server.complete, max_tokens=4000) for _ in range(2)]
        server.wait(lambda: server.metric("num_requests_running") == 7)
        time.sleep(0.5)
        os.kill(server.engine_pid, signal.SIGKILL)
        killed = time.monotonic()
        ended = {path: one.read().decode() for path, one in streams.items()}
        answers = [one.result() for one in whole]
        took = time.monotonic() - killed
        assert took < 1.0
        for path, (_, sign) in SURFACES.items():
            assert sign in ended[path] and "engine is not running" in ended[path], path
        for answer in answers:
            assert answer.status == 503 and int(answer.headers["Retry-After"]) >= 1
            assert json.loads(answer.read())["error"]["code"] == "engine_dead"
        told = json.loads(server.get(f"/v1/responses/{background['id']}")[1])
        assert told["status"] == "failed" and "engine is not running" in told["error"]["message"]
        assert server.get("/health")[0] == 503 and server.get("/health/live")[0] == 200
        down = server.wait(lambda: server.get("/health")[0] == 200, 60)
        assert server.complete(max_tokens=4).status == 200
        assert server.metric("engine_restarts_total") == 1
        print(f"error events after {1e3 * took:.0f} ms, serving again after {down + took:.1f} s")


@pytest.mark.slow
def test_both_ports_tell_the_servers_metrics_while_the_engine_stands_still(model: Path) -> None:
    with served(model) as server:
        os.kill(server.engine_pid, signal.SIGSTOP)
        answers = [server.get("/metrics", port) for port in (server.probe_port, server.port)]
        os.kill(server.engine_pid, signal.SIGCONT)
        for status, text in answers:
            assert status == 200 and b"pagegraph:engine_restarts_total" in text
        assert server.metric("num_requests_running") == 0 and server.free()


@pytest.mark.slow
def test_a_wedged_step_is_dumped_and_the_engine_replaced(model: Path) -> None:
    """With the default watchdog_timeout_s."""
    with served(model, max_num_seqs=SLOTS) as server:
        for _ in range(3):
            assert server.complete(max_tokens=50).read()
        stream = server.complete(max_tokens=100, seed=WEDGED, stream=True)
        first_event(stream)
        begun = time.monotonic()
        late = server.wait(lambda: server.get("/health")[0] == 503, 12)
        assert late < 10.0 and server.get("/health/live")[0] == 200
        rest = stream.read().decode()
        ended = time.monotonic() - begun
        assert "engine_dead" in rest and 29 < ended < 36
        assert 'faulty_engine.py", line' in server.output and "in wedge" in server.output
        server.wait(lambda: server.get("/health")[0] == 200, 60)
        back = time.monotonic() - begun
        assert server.complete(max_tokens=4).status == 200
        print(f"/health 503 after {late:.1f} s, error event after {ended:.1f} s, serving again after {back:.1f} s")


@pytest.mark.slow
def test_a_killed_web_process_frees_what_it_held_and_is_replaced(model: Path) -> None:
    with served(model, step_s=0.01, max_num_seqs=SLOTS, workers=2) as server:
        streams = [server.complete(max_tokens=4000, stream=True) for _ in range(SLOTS)]
        for one in streams:
            first_event(one)
        server.wait(lambda: server.metric("num_requests_running") == SLOTS)
        for pid in server.web_pids:
            os.kill(pid, signal.SIGKILL)
        freed = server.wait(server.free)
        again = server.wait(lambda: server.get("/health")[0] == 200)
        assert len(server.web_pids) == 2
        assert server.complete(max_tokens=4).status == 200
        assert server.metric("engine_restarts_total") == 0
        print(f"freed after {freed:.1f} s, answering again after {freed + again:.1f} s")


@pytest.mark.slow
def test_thirty_two_streams_end_well_when_the_server_is_stopped(model: Path) -> None:
    with served(model, step_s=0.01, max_num_seqs=16) as server, ThreadPoolExecutor(32) as threads:
        streams = [threads.submit(server.complete, max_tokens=300, stream=True) for _ in range(32)]
        server.wait(lambda: server.metric("num_requests_waiting") == 16)
        server.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        ends = [one.result().read().decode() for one in streams]
        assert all('"finish_reason":"length"' in end and end.endswith("data: [DONE]\n\n") for end in ends)
        assert server.process.wait(40) == 0
        print(f"32 streams done and the server gone {time.monotonic() - asked:.1f} s after SIGTERM")


LOAD = """
import http.client, json, sys, threading, time
port, clients, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
until, statuses, lock = time.monotonic() + seconds, {}, threading.Lock()
def client():
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(dict(model="m", prompt="hello", max_tokens=50, ignore_eos=True)),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        with lock:
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
        if answer.status == 503:
            time.sleep(min(float(answer.headers["Retry-After"]), max(until - time.monotonic(), 0)))
        connection.close()
threads = [threading.Thread(target=client) for _ in range(clients)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(statuses))
"""


@pytest.mark.slow
def test_probes_are_answered_within_100_ms_under_ten_times_the_load(model: Path) -> None:
    """Half of those whom batch and queue hold would be served; ten times as many clients as those come for 30 s."""
    with served(model, step_s=0.01, max_num_seqs=SLOTS, max_queue=SLOTS) as server:
        command = [sys.executable, "-c", LOAD, str(server.port), str(10 * 2 * SLOTS), "30"]
        load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.nice(5))
        times: dict[str, list[float]] = {}
        while load.poll() is None:
            for path, port in (("/health/live", server.port), ("/health", server.port), ("/health", server.probe_port)):
                asked = time.monotonic()
                assert server.get(path, port)[0] == 200
                times.setdefault(f"{path} {'probes' if port == server.probe_port else 'API'}", []).append(
                    1e3 * (time.monotonic() - asked)
                )
            time.sleep(0.05)
        statuses = json.loads(load.communicate()[0])
        p99 = {name: sorted(those)[int(0.99 * len(those))] for name, those in times.items()}
        print(statuses, {name: f"{value:.0f} ms of {len(times[name])}" for name, value in p99.items()})
        assert set(statuses) == {"200", "503"}
        assert max(p99.values()) < 100
        server.wait(server.free)
