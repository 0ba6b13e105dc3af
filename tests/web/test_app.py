"""The key check on every path, the probes, and that a worker stays free of torch."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.runtime.engine.metrics import EngineMetrics
from pagegraph.runtime.ipc.connection import Connection
from pagegraph.runtime.server import health
from pagegraph.web.app import create_app

PATHS = ["/v1/models", "/v1/models/tiny", "/v1/completions", "/v1/chat/completions", "/metrics", "/version", "/load", "/none",
         "/tokenize", "/detokenize", "/tokenizer_info", "/v1/responses", "/v1/responses/resp_1", "/openapi.json", "/docs/", "/docs/x",
         "//v1/models", "/health/", "/health/../v1/models", "/%2e/v1/models"]  # fmt: skip


def test_importing_the_app_imports_no_torch() -> None:
    code = "import sys, web.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "HEAD"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_but_health_needs_the_key(make_app: Callable[..., Flask], path: str, method: str) -> None:
    client = make_app(api_key="s3cret").test_client()
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Basic s3cret"},
                   {"Authorization": "Bearer \xff"}, {"x-api-key": "wrong"}, {"x-api-key": "\xff"}):  # fmt: skip
        answer = client.open(path, method=method, headers=header)
        assert answer.status_code == 401
        assert method == "HEAD" or answer.json["error"]["code"] == "invalid_api_key"


def test_the_key_opens_and_health_is_open(make_app: Callable[..., Flask]) -> None:
    client = make_app(api_key="s3cret").test_client()
    assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    for path in ("/health", "/health/live", "/health/ready", "/ping"):
        assert client.get(path).status_code == 200
    assert client.post("/ping").status_code == 200
    page = client.get("/docs")  # a browser has no header for it; what it shows it asks for with the key
    assert page.status_code == 200 and page.data == make_app().test_client().get("/docs").data
    assert client.post("/docs").status_code == 405


def test_health_follows_the_engine(http: FlaskClient, fake_engine) -> None:
    assert http.get("/health").json == {"status": "ready"}
    fake_engine.stop()
    limit = time.monotonic() + 10  # a busy machine tells of a closed socket late
    while http.get("/health").status_code == 200 and time.monotonic() < limit:
        time.sleep(0.02)
    for path in ("/health", "/health/ready", "/health/live"):
        answer = http.get(path)
        assert answer.status_code == 503 and answer.headers["Retry-After"] and answer.json == {"status": "no engine"}


def test_an_engine_that_makes_no_progress_is_not_live(http: FlaskClient, fake_engine) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, stalled_s=1.9)  # the limit is 2 s
    assert [http.get(f"/health/{asked}").status_code for asked in ("live", "ready")] == [200, 200]
    fake_engine.info = msgspec.structs.replace(fake_engine.info, stalled_s=2.1)
    time.sleep(1.2)  # over a heartbeat
    for asked in ("live", "ready"):
        answer = http.get(f"/health/{asked}")
        assert (answer.status_code, answer.json) == (503, {"status": "stalled"})


def test_a_slow_engine_is_live_and_gets_no_new_requests(make_app: Callable[..., Flask], fake_engine) -> None:
    http = make_app(silence_s=300.0).test_client()
    fake_engine.info = msgspec.structs.replace(fake_engine.info, stalled_s=health.UNREADY_S + 1)
    assert http.get("/health/live").status_code == 200
    answer = http.get("/health/ready")
    assert (answer.status_code, answer.json) == (503, {"status": "no progress"})


def test_an_engine_that_says_nothing_gets_no_new_requests(
    make_app: Callable[..., Flask], fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "UNREADY_S", 1.5)
    http = make_app(silence_s=300.0).test_client()
    assert http.get("/health/ready").status_code == 200
    fake_engine.silent = True
    _wait_while_200(http, "/health/ready", 20)
    assert http.get("/health/live").status_code == 200


def test_a_silent_engine_is_not_live(make_app: Callable[..., Flask], fake_engine) -> None:
    http = make_app(silence_s=0.5).test_client()
    assert http.get("/health/live").status_code == 200
    fake_engine.silent = True
    _wait_while_200(http, "/health/live", 10)


@pytest.mark.parametrize("where", ["_receive", "_take"])
def test_a_thread_to_the_engine_that_hangs_is_seen(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It counts the engine's silence, and cannot count its own."""
    monkeypatch.setattr(health, "OVERDUE_S", 0.2)
    http, go_on, real = make_app(silence_s=1.5).test_client(), threading.Event(), getattr(Connection, where)
    assert http.get("/health/live").status_code == 200
    monkeypatch.setattr(Connection, where, lambda self, *args: (go_on.wait(30), real(self, *args)))
    try:
        _wait_while_200(http, "/health/live", 10)
        assert http.get("/health").json == {"status": "no engine"}
    finally:
        go_on.set()
    deadline = time.monotonic() + 10
    while http.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_thread_to_the_engine_that_ends_is_replaced(make_app: Callable[..., Flask], fake_engine) -> None:
    http = make_app().test_client()
    assert http.get("/health").status_code == 200
    connection = http.application.extensions["pagegraph"].engine.clients[0].connection
    connection._take = lambda message: 1 / 0
    connection._thread.join(10)
    assert not connection.running and http.get("/health").status_code == 200


def _wait_while_200(http: FlaskClient, path: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while http.get(path).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_draining_is_not_ready(http: FlaskClient, fake_engine) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, draining=True)
    assert http.get("/health/ready").json == {"status": "draining"}
    assert http.get("/health/ready").status_code == 503
    assert http.get("/health/live").status_code == 200


def test_the_load_is_what_runs_and_waits(http: FlaskClient, fake_engine) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, num_running=2, num_waiting=3)
    assert http.get("/load").json == {"server_load": 5}


def test_metrics_come_from_the_engine(make_app: Callable[..., Flask]) -> None:
    text = EngineMetrics("tiny", 128).render()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    answer = make_app(probe_address=address).test_client().get("/metrics")
    server.shutdown()
    server.server_close()
    assert answer.data == text and answer.headers["Content-Type"].startswith("text/plain")
    assert make_app(probe_address=address).test_client().get("/metrics").status_code == 503
    assert make_app().test_client().get("/metrics").status_code == 404


def test_request_id_is_kept_when_sane(http: FlaskClient) -> None:
    assert http.get("/health/live", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/health/live", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_a_bad_setting_is_named() -> None:
    with pytest.raises(ValueError, match="mdoel"):
        create_app({"mdoel": "x"})
    with pytest.raises(ValueError, match="engine_addresses"):
        create_app({"model": "x", "served_model_name": "y"})


def test_a_key_from_the_environment_is_asked_for(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEGRAPH_API_KEY", "s3cret")
    client = make_app().test_client()
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
