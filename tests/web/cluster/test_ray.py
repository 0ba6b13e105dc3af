"""Two replicas on a Ray of this machine's own, as clients meet them: `make ray`, which has Ray in an environment of its own.

The model is tiny and random; the cluster, its processes and the HTTP between them are real.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import APIError, OpenAI

from tests.runtime.server.served_model import ask, first_event, tiny_model
from tests.web.web_process import eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
ray = pytest.importorskip(
    "ray", reason="Ray is no dependency of the tests; `make ray` runs them in an environment with it"
)

from ray import serve  # noqa: E402

from pagegraph.runtime.config import ConfigError, load_config  # noqa: E402
from pagegraph.runtime.doctor.rules import Metrics  # noqa: E402
from pagegraph.web.cluster import application  # noqa: E402
from pagegraph.web.cluster.autoscaling import RUNNING, WAITING  # noqa: E402

SLOTS, QUEUE = 4, 2
LONG = 3500  # tokens, for which a stream has not ended when something else happens
START_S = 120.0
SETTINGS = dict(
    served_model_name="m", device="cpu", dtype="float32", compile=False, kv_cache_memory=64 << 20, max_model_len=4096,
    workers=1, num_threads=1, max_num_seqs=SLOTS, max_queue=QUEUE, requests_per_minute=100_000, drain_timeout_s=2,
)  # fmt: skip


class Cluster:
    """The front's address, and the processes behind it."""

    def __init__(self, port: int, model: str) -> None:
        self.port = port
        self._model = model

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """The answer, whose body is still to be read; closing it closes the connection."""
        content = None if body is None else body if isinstance(body, bytes) else json.dumps({"model": "m"} | body)
        return ask(self.port, method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})

    def json(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with contextlib.closing(self.ask(method, path, body, **headers)) as answer:
            return answer.status, json.loads(answer.read())

    def complete(self, prompt: str, **more: Any) -> tuple[int, Any]:
        return self.json("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 2, "temperature": 0} | more)

    def stream(self, prompt: str) -> http.client.HTTPResponse:
        body = {"prompt": prompt, "max_tokens": LONG, "ignore_eos": True, "temperature": 0, "stream": True}
        answer = self.ask("POST", "/v1/completions", body)
        first_event(answer)
        return answer

    def servers(self) -> dict[int, int]:
        """Processes of replicas: that of the replica, and of the server behind it."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_text()
                if "pagegraph.web.cluster.server_process" in command and self._model in command:
                    found[int((path / "stat").read_text().rpartition(")")[2].split()[1])] = int(path.name)
        return found

    def loads(self) -> list[float]:
        """Sequences that run and wait, of each replica, by the metrics of the server behind it."""
        return [sum(self._metrics(pid)(name) for name in (RUNNING, WAITING)) for pid in self.servers().values()]

    @staticmethod
    def _metrics(pid: int) -> Metrics:
        ports = [one.laddr.port for one in psutil.Process(pid).net_connections("tcp4") if one.status == "LISTEN"]
        with urllib.request.urlopen(
            f"http://127.0.0.1:{ports[0]}/metrics", timeout=20
        ) as answer:  # of the API or of probes
            return Metrics(answer.read().decode())

    def wait(self, replicas: int = 2) -> None:
        """Until so many serve, and nothing runs."""

        def there() -> bool:
            with contextlib.suppress(psutil.Error, OSError):  # of a server that has ended this moment
                return is_so()
            return False

        def is_so() -> bool:
            details = serve.status().applications["pagegraph"].deployments["Replica"]
            return details.replica_states == {"RUNNING": replicas} and self.loads() == [0] * replicas

        assert eventually(there, START_S), serve.status()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Iterator[Cluster]:
    model = tiny_model(tmp_path_factory.mktemp("model"), tokenizer_folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        patch.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        sooner = {"upscale_delay_s": 2, "downscale_delay_s": 3, "look_back_period_s": 3}
        usual = application.autoscaling_of
        patch.setattr(application, "autoscaling_of", lambda *asked: usual(*asked) | sooner)
        running = Cluster(port, str(model))
        ray.init(num_cpus=8, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            args = {"config": str(model), "num_replicas": 2, "max_replicas": 3, **SETTINGS}
            serve.run(application.build(args), name="pagegraph", route_prefix="/")
            yield running
        finally:
            serve.shutdown()
            ray.shutdown()
            assert eventually(lambda: not running.servers(), 20)


def test_answers_pass_unchanged(cluster: Cluster) -> None:
    """Statuses, headers and bodies of every kind are the server's own."""
    with contextlib.closing(
        cluster.ask("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 1}, X_Request_ID="mine")
    ) as answer:
        assert answer.status == 200 and answer.headers["x-request-id"] == "mine"
        assert answer.headers["x-ratelimit-limit-requests"] == "100000"
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 1
    assert cluster.json("POST", "/tokenize", {"prompt": "hello"}, Expect="100-continue", TE="trailers")[0] == 200
    assert cluster.json("GET", "/v1/models")[1]["data"][0]["id"] == "m"
    assert cluster.json("GET", "/v1/models/other")[0] == 404
    assert cluster.json("GET", "/health") == (200, {"status": "ready"})
    status, body = cluster.json("POST", "/v1/completions", {"prompt": "hello", "max_tokens": -1})
    assert status == 400 and body["error"]["param"] == "max_tokens"
    status, body = cluster.json("POST", "/v1/messages", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 400 and body["type"] == "error"
    status, body = cluster.json("POST", "/tokenize", {"prompt": "hello"})
    assert status == 200 and cluster.json("POST", "/detokenize", {"tokens": body["tokens"]})[1]["prompt"] == "hello"
    assert cluster.json("POST", "/v1/completions", b"{" + b" " * (9 << 20) + b"}")[0] == 413
    with contextlib.closing(cluster.ask("DELETE", "/v1/models")) as answer:
        assert answer.status == 405 and "GET" in answer.headers["allow"]
    with contextlib.closing(cluster.ask("HEAD", "/docs?x=1")) as answer:
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/html") and answer.read() == b""
    with contextlib.closing(cluster.ask("GET", "/metrics")) as answer:
        assert b"pagegraph:num_requests_waiting" in answer.read()


def test_streams_of_each_api_come_event_by_event(cluster: Cluster) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{cluster.port}/v1", api_key="none", max_retries=0)
    chunks = list(client.completions.create(model="m", prompt="hello", max_tokens=40, stream=True, temperature=0))
    assert len(chunks) > 3 and chunks[-1].choices[0].finish_reason
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == cluster.complete("hello", max_tokens=40)[1]["choices"][0]["text"]
    with contextlib.closing(
        cluster.ask(
            "POST", "/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
        )
    ) as answer:
        events = [line for line in answer.read().decode().splitlines() if line.startswith("event:")]
    assert events[0] == "event: message_start" and events[-1] == "event: message_stop"
    with contextlib.closing(cluster.stream("hello")) as answer:  # whose end is seconds away
        assert b"[DONE]" not in first_event(answer)
    cluster.wait()  # the client left: nothing runs any more


def test_conversations_stay_with_their_replica(cluster: Cluster) -> None:
    prompts = [letter * 600 for letter in "abcd"]
    for prompt in prompts:
        assert cluster.complete(prompt)[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for more in ("one", "one and two"):
        for prompt in prompts:
            usage = cluster.complete(f"{prompt} {more}")[1]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > 0.8 * usage["prompt_tokens"] - 20


def test_a_stored_response_is_found_wherever_it_is(cluster: Cluster) -> None:
    made = [
        cluster.json("POST", "/v1/responses", {"input": letter * 200, "max_output_tokens": 2})[1]["id"]
        for letter in "qrstuv"
    ]
    for one in made:
        assert cluster.json("GET", f"/v1/responses/{one}")[1]["id"] == one
        status, body = cluster.json(
            "POST", "/v1/responses", {"input": "and", "previous_response_id": one, "max_output_tokens": 2}
        )
        assert status == 200 and body["previous_response_id"] == one
        assert cluster.json("DELETE", f"/v1/responses/{one}")[0] == 200
        assert cluster.json("GET", f"/v1/responses/{one}")[0] == 404
    status, body = cluster.json("POST", "/v1/responses", {"input": "and", "previous_response_id": made[0]})
    assert status == 400 and body["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize("whose", ["replica", "server"])
def test_the_end_of_one_is_its_streams_end_and_nobody_elses(cluster: Cluster, whose: str) -> None:
    """The error event, for whom it computed; the others' streams go on; another takes its place, and requests meanwhile."""
    cluster.wait()
    before = cluster.servers()
    assert len(before) == 2
    streams = [cluster.stream(letter * 300) for letter in "wx"]
    assert cluster.loads() == [1, 1]
    victim = next(iter(before))
    os.kill(victim if whose == "replica" else before[victim], signal.SIGKILL)
    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(read_all, streams))
    broken = [end for end in ends if b"[DONE]" not in end]
    assert len(broken) == 1 and broken[0].count(b"engine_dead") == 1
    (event,) = [line for line in broken[0].splitlines() if b"engine_dead" in line]
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "the server of this answer has ended"
    assert cluster.complete("y" * 300)[0] == 200
    assert eventually(lambda: len(cluster.servers()) == 2 and victim not in cluster.servers(), START_S)
    cluster.wait()
    assert {cluster.complete(letter * 300)[0] for letter in "wxyz"} == {200}


def read_all(answer: http.client.HTTPResponse) -> bytes:
    """Until its end, or its connection's."""
    got = b""
    with contextlib.closing(answer), contextlib.suppress(http.client.HTTPException, ConnectionError):
        while piece := answer.read1():
            got += piece
    return got


def test_the_official_client_raises_where_a_replica_ends(cluster: Cluster) -> None:
    cluster.wait()
    client = OpenAI(base_url=f"http://127.0.0.1:{cluster.port}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model="m", prompt="hi", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    for victim in cluster.servers():
        os.kill(victim, signal.SIGKILL)
    with pytest.raises(APIError, match="the server of this answer has ended"):
        list(stream)
    assert cluster.complete("hello")[0] == 200  # waits for the next replica
    cluster.wait()


def test_a_queue_makes_replicas_and_its_end_ends_them(cluster: Cluster) -> None:
    cluster.wait()
    places = 2 * (SLOTS + QUEUE)
    streams = [cluster.ask("POST", "/v1/completions", {"prompt": "z" * number, "max_tokens": LONG, "ignore_eos": True, "stream": True})
               for number in range(1, places + 1)]  # fmt: skip
    try:
        assert {stream.status for stream in streams} == {200}
        assert eventually(lambda: len(cluster.servers()) == 3, START_S)
    finally:
        for stream in streams:
            stream.close()
    assert eventually(lambda: len(cluster.servers()) == 2, START_S)
    cluster.wait()


def test_a_full_cluster_refuses_and_says_when_to_come_back(cluster: Cluster) -> None:
    places = 2 * (SLOTS + QUEUE)
    with ThreadPoolExecutor(places) as threads:
        body = {"max_tokens": LONG, "ignore_eos": True, "stream": True}
        streams = list(
            threads.map(
                lambda number: cluster.ask("POST", "/v1/completions", body | {"prompt": "q" * number}),
                range(1, 1 + places),
            )
        )
    try:
        with contextlib.closing(cluster.ask("POST", "/v1/completions", {"prompt": "one more"})) as answer:
            assert (
                answer.status == 503 and int(answer.headers["retry-after"]) >= 1 and b"queue is full" in answer.read()
            )
    finally:
        for stream in streams:
            stream.close()
    cluster.wait()


def test_arguments_that_no_replica_could_take_are_refused(tmp_path: Path) -> None:
    for args, told in (
        ({}, "config is missing"),
        ({"config": "m", "port": 1}, "port is no argument of the application: replicas listen on the loopback"),
        ({"config": "m", "api_key": "k"}, "use api_key_file, or PAGEGRAPH_API_KEY"),
        ({"config": "m", "num_replicas": 3, "max_replicas": 2}, "max_replicas=2 is below num_replicas=3; set it to 3"),
        (
            {"config": "m", "tensor_parallel_size": 2, "nnodes": 2, "master_addr": "h"},
            "nnodes=2: a replica is on one node",
        ),
        ({"config": "m", "max_num_seq": 3}, "did you mean max_num_seqs"),
    ):
        with pytest.raises(ConfigError, match=told):
            application.build(args)
    config = load_config("org/m", {"tensor_parallel_size": 2, "data_parallel_size": 3, "max_num_seqs": 8}).config
    assert application.options_of(config)["ray_actor_options"] == {"num_gpus": 6, "num_cpus": 1}
    assert application.autoscaling_of(config, 1, 4)["target_ongoing_requests"] == 18
