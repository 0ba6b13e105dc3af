"""Spans of requests, in an exporter that keeps them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.runtime.config import Config, ConfigError, check
from pagegraph.web import app as app_module
from tests.paths import ROOT
from tests.web.web_process import eventually

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SECRET = "the words of a prompt"
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app_module, "connect", lambda endpoint, service_name: provider)
    return exporter


@pytest.fixture
def client(exported: InMemorySpanExporter, make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app(otlp_traces_endpoint="http://localhost:4318/v1/traces").test_client()


def spans(exported: InMemorySpanExporter, count: int) -> dict[str, Any]:
    assert eventually(lambda: len(exported.get_finished_spans()) >= count)
    found = exported.get_finished_spans()
    assert len(found) == count, [span.name for span in found]
    return {span.name: span for span in found}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_part_of_the_trace_that_it_brings(
    client: FlaskClient, exported: InMemorySpanExporter, stream: bool
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "X-Request-Id": "my-id", "Authorization": "Bearer s3cret"}
    answer = client.post("/v1/chat/completions?secret=1", json=CHAT | {"stream": stream}, headers=headers)
    assert answer.status_code == 200 and answer.data
    answer.close()
    found = spans(exported, 4)
    request = found.pop("POST /v1/chat/completions")
    assert f"{request.context.trace_id:032x}" == TRACE and f"{request.parent.span_id:016x}" == SPAN
    assert (
        request.attributes["http.response.status_code"] == 200 and request.attributes["gen_ai.request.model"] == "tiny"
    )
    assert set(found) == {"queue", "prefill", "decode"}
    for span in found.values():
        assert span.context.trace_id == request.context.trace_id and span.parent.span_id == request.context.span_id
        assert span.attributes["gen_ai.request.id"] == "my-id" == request.attributes["gen_ai.request.id"]
        assert span.attributes["gen_ai.usage.output_tokens"] == 3
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in found.items()}
    assert seconds == pytest.approx({"queue": 1, "prefill": 2, "decode": 4}, abs=1e-3)
    assert found["queue"].end_time == pytest.approx(found["prefill"].start_time, abs=1e6)
    assert found["decode"].end_time / 1e9 == pytest.approx(time.time(), abs=5)
    told = "".join(span.to_json() for span in exported.get_finished_spans())
    assert not any(secret in told for secret in (SECRET, "s3cret", "secret=1"))


def test_without_a_trace_a_request_begins_one_with_spans_of_each_sequence(
    client: FlaskClient, exported: InMemorySpanExporter
) -> None:
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, "n": 2}).close()
    found = spans(exported, 1 + 2 * 3)
    assert found["POST /v1/completions"].parent is None and len({span.context.trace_id for span in found.values()}) == 1


def test_what_a_trace_does_not_sample_costs_nothing(
    client: FlaskClient, exported: InMemorySpanExporter, fake_engine
) -> None:
    client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert fake_engine.submits[-1].trace == "" and not exported.get_finished_spans()


def test_refusals_have_spans_and_probes_have_none(client: FlaskClient, exported: InMemorySpanExporter) -> None:
    client.get("/health").close()
    client.post("/v1/completions", json={"prompt": 3}, headers={"traceparent": "junk"}).close()
    client.get("/nowhere").close()
    found = spans(exported, 2)
    assert found["POST /v1/completions"].attributes["http.response.status_code"] == 400
    assert found["GET unknown route"].attributes["http.response.status_code"] == 404


def test_a_server_without_an_endpoint_imports_nothing_of_it(make_app: Callable[..., Flask], fake_engine) -> None:
    make_app().test_client().post("/v1/chat/completions", json=CHAT)
    assert fake_engine.submits[-1].trace == ""
    code = "import sys, pagegraph.web.app; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_the_packages_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model="org/name", otlp_traces_endpoint="http://localhost:4318/v1/traces")
    check(config)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"needs OpenTelemetry: pip install 'pagegraph\[otel\]'"):
        check(config)
