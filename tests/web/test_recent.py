"""What became of the last requests, told to whoever asked for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

CHAT = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 4}


def test_sizes_and_times_and_no_text(http: FlaskClient) -> None:
    assert http.get("/recent_requests").json == {"object": "list", "data": []}
    for name in ("first", "second"):
        http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": name})
    answer = http.get("/recent_requests")
    newest, oldest = answer.json["data"]
    assert (newest["request_id"], oldest["request_id"]) == ("second", "first")
    assert newest.pop("created") == pytest.approx(time.time() - 7, abs=2)
    prompt = newest.pop("prompt_tokens")
    assert prompt > 0 and {name: round(v, 3) if isinstance(v, float) else v for name, v in newest.items()} == {
        "request_id": "second", "finish_reason": "stop", "cached_tokens": 2, "cache_miss_reason": "new", "completion_tokens": 3, "total_s": 7.0,
        "queue_s": 1.0, "prefill_s": 2.0, "decode_s": 4.0,
    }  # fmt: skip
    assert "secret" not in answer.text


def test_a_key_sees_its_own_alone(make_app: Callable[..., Flask]) -> None:
    client = make_app(api_key="one\ntwo").test_client()
    mine, theirs = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    assert client.post("/v1/chat/completions", json=CHAT, headers=mine).status_code == 200
    assert len(client.get("/recent_requests", headers=mine).json["data"]) == 1
    assert client.get("/recent_requests", headers=theirs).json["data"] == []
    assert client.get("/recent_requests").status_code == 401


def test_a_silent_engine_is_not_waited_for(http: FlaskClient, fake_engine) -> None:
    http.get("/recent_requests")
    fake_engine.silent = True
    answer = http.get("/recent_requests")
    assert answer.status_code == 503 and answer.json["error"]["code"] == "engine_dead"
