"""A line for each answer, and nothing of what was asked or said in it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from flask import Flask

from pagegraph.runtime.server.logs import FIELDS

SECRET = "the words of a prompt"
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}


def fields(caplog: pytest.LogCaptureFixture) -> list[dict]:
    return [getattr(record, FIELDS) for record in caplog.records if record.name == "pagegraph.requests"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_a_line(make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    client = make_app(log_requests=True, api_key="s3cret").test_client()
    headers = {"Authorization": "Bearer s3cret", "X-Request-Id": "my-id"}
    with caplog.at_level(logging.INFO):
        answer = client.post("/v1/chat/completions?secret=1", json=CHAT | {"stream": stream}, headers=headers)
        assert answer.status_code == 200 and answer.data
        answer.close()
    (found,) = fields(caplog)
    assert found.pop("ms") > 0
    assert found == {
        "method": "POST", "path": "/v1/chat/completions", "status": 200, "request_id": "my-id", "client": "127.0.0.1",
    }  # fmt: skip
    assert not any(secret in caplog.text for secret in (SECRET, "s3cret", "secret=1"))
    assert "POST /v1/chat/completions 200 " in caplog.text


def test_refusals_are_lines_and_probes_are_not(
    make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    client = make_app(log_requests=True, api_key="s3cret").test_client()
    with caplog.at_level(logging.INFO):
        for path in ("/v1/models", "/no%0Athing%1B%5B31m", "/health", "/metrics"):
            client.get(path).close()
    assert [(one["path"], one["status"]) for one in fields(caplog)] == [
        ("/v1/models", 401),
        ("/no%0Athing%1B%5B31m", 401),
    ]


def test_there_are_none_unless_asked(make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_app().test_client().get("/v1/models").close()
    assert not fields(caplog)
