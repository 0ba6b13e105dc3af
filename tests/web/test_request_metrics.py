"""What is counted of an answer, by labels that clients cannot make up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask

from pagegraph.web.request_metrics import registry

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
def counted() -> Callable[..., float]:
    """How much a sample has grown since the test began; labels in the order of their names."""
    at_first = {}

    def grown(name: str = "http_requests_total", **labels: str) -> float:
        return (registry.get_sample_value(name, labels) or 0.0) - at_first.get((name, *labels.items()), 0.0)

    for family in registry.collect():
        for sample in family.samples:
            at_first[sample.name, *sample.labels.items()] = sample.value
    return grown


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_counts_once_it_is_sent(make_app: Callable[..., Flask], counted, stream: bool) -> None:
    client = make_app(api_key="k").test_client()
    of_chat = {"handler": "/v1/chat/completions", "method": "POST"}
    answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers={"Authorization": "Bearer k"})
    assert answer.data and answer.status_code == 200
    answer.close()
    assert counted(**of_chat, status="2xx") == 1
    assert counted("http_request_duration_seconds_count", **of_chat) == 1
    assert 0 < counted("http_request_duration_seconds_sum", **of_chat) < 60


def test_refusals_count_and_clients_make_up_no_labels(make_app: Callable[..., Flask], counted) -> None:
    client = make_app(api_key="k").test_client()
    headers = {"Authorization": "Bearer k"}
    client.get("/v1/models").close()
    client.get("/v1/responses/resp_1", headers=headers).close()
    for path in ("/made-up/1", "/made-up/2"):
        client.get(path, headers=headers).close()
    client.open("/v1/models", method="MADEUP", headers=headers).close()
    client.get("/health").close()
    assert counted(handler="/v1/models", method="GET", status="4xx") == 1
    assert counted(handler="/v1/responses/<id>", method="GET", status="4xx") == 1
    assert counted(handler="none", method="GET", status="4xx") == 2
    assert counted(handler="none", method="none", status="4xx") == 1
    assert not any(
        "made-up" in str(family.samples) or "/health" in str(family.samples) for family in registry.collect()
    )
