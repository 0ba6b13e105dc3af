"""What clients of a real server meet when something fails: an engine, a step, a request, a web process, a client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.runtime.server.faulty_engine import POISONED
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


def test_a_poisoned_request_of_eight_ends_alone(server: ServedModel) -> None:
    """The others' tokens and log-probabilities are those of a run without it."""

    def ask(number: int, seed: int) -> tuple[int, list[str], list[float]]:
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
    for number in set(range(SLOTS)) - {5}:
        assert troubled[number][1] == clean[number][1]
        assert troubled[number][2] == pytest.approx(clean[number][2], abs=1e-5)  # of batches of other sizes
    assert server.metric("engine_restarts_total") == 0
    server.wait(server.free)


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
