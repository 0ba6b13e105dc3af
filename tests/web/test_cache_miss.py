"""Why a cache hit was not longer, in the answers of each API; usage holds numbers alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask.testing import FlaskClient

ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 3, "n": 2},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9},
}


def told(value: Any) -> list[str]:
    """What all `cache_miss_reason` of a JSON value say; none is within `usage`."""
    if isinstance(value, list):
        return [one for part in value for one in told(part)]
    if not isinstance(value, dict):
        return []
    assert not told(value.get("usage"))
    own = [value["cache_miss_reason"]] if "cache_miss_reason" in value else []
    return own + [one for part in value.values() for one in told(part)]


@pytest.fixture
def missing(fake_engine):
    """An engine whose prompts were evicted."""
    script = fake_engine.script

    def evicted(submit):
        deltas = script(submit)
        for delta in deltas:
            delta.cache_miss = "evicted"
        return deltas

    fake_engine.script = evicted
    return fake_engine


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_tells_it_once(http: FlaskClient, missing, path: str) -> None:
    assert told(http.post(path, json=ASKED[path]).json) == ["evicted"]


@pytest.mark.parametrize("path", ASKED)
def test_a_stream_tells_it_beside_usage(http: FlaskClient, missing, path: str) -> None:
    options = {"stream_options": {"include_usage": True}} if path.endswith("completions") else {}
    text = http.post(path, json=ASKED[path] | {"stream": True} | options).get_data(as_text=True)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert told(events) == ["evicted"]


@pytest.mark.parametrize("path", ASKED)
def test_nothing_is_told_where_nothing_was_missed(http: FlaskClient, path: str) -> None:
    assert told(http.post(path, json=ASKED[path]).json) == []


def test_prompts_that_missed_for_several_reasons(http: FlaskClient, fake_engine) -> None:
    script, reasons = fake_engine.script, iter(("new", "", "evicted", "new"))

    def each(submit):
        deltas, reason = script(submit), next(reasons)
        for delta in deltas:
            delta.cache_miss = reason
        return deltas

    fake_engine.script = each
    answer = http.post("/v1/completions", json={"prompt": ["a", "b", "c", "d"], "max_tokens": 2})
    assert told(answer.json) == ["new, evicted"]
