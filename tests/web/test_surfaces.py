"""Reasoning on every surface that answers a chat: the same parts, each in the surface's own shape, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.runtime.text.tokenizer import Tokenizer

SURFACES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 100},
}
THOUGHT, SAID = "the end is near", "hello world"


@pytest.fixture
def say(fake_engine, tokenizer_folder) -> Callable[[str], None]:
    tokenizer = Tokenizer.load(tokenizer_folder)

    def say(text: str) -> None:
        ids = [*tokenizer.encode(text), tokenizer.encode("<|end|>")[0]]
        fake_engine.script = lambda submit: fake_engine.deltas(submit, ids, "stop", ids[-1])

    return say


@pytest.fixture
def http(make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app(reasoning_parser="qwen3").test_client()


def parts(path: str, body: dict[str, Any]) -> tuple[str, str]:
    """(reasoning, text) of an answer."""
    if path == "/v1/chat/completions":
        message = body["choices"][0]["message"]
        return message.get("reasoning") or "", message["content"]
    if path == "/v1/messages":
        texts = {block["type"]: block.get("thinking", block.get("text")) for block in body["content"]}
        return texts.get("thinking", ""), texts.get("text", "")
    texts = {item["type"]: item["content"][0]["text"] for item in body["output"]}
    return texts.get("reasoning", ""), texts.get("message", "")


def streamed(path: str, data: bytes) -> tuple[str, str]:
    """(reasoning, text) of a stream's deltas."""
    reasoning, text = "", ""
    for line in data.decode().split("\n"):
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        if path == "/v1/chat/completions":
            for choice in event["choices"]:
                reasoning += choice["delta"].get("reasoning", "")
                text += choice["delta"].get("content", "")
        elif path == "/v1/messages":
            delta = event.get("delta", {})
            reasoning += delta.get("thinking", "")
            text += delta.get("text", "")
        elif event["type"] == "response.reasoning_text.delta":
            reasoning += event["delta"]
        elif event["type"] == "response.output_text.delta":
            text += event["delta"]
    return reasoning, text


@pytest.mark.parametrize("path", SURFACES)
@pytest.mark.parametrize(("thought", "said"), [(THOUGHT, SAID), (THOUGHT, ""), ("", SAID)])
def test_reasoning_has_its_place(http: FlaskClient, say, path: str, thought: str, said: str) -> None:
    say(f"<think>{thought}</think>{said}" if thought else said)
    body = http.post(path, json=SURFACES[path]).json
    assert parts(path, body) == (thought, said)
    assert streamed(path, http.post(path, json={**SURFACES[path], "stream": True}).data) == (thought, said)


def test_reasoning_is_counted_and_may_be_sent_back(http: FlaskClient, say, fake_engine) -> None:
    say(f"<think>{THOUGHT}</think>{SAID}")
    first = http.post("/v1/responses", json={"input": "hello"}).json
    details = first["usage"]["output_tokens_details"]
    assert 0 < details["reasoning_tokens"] < first["usage"]["output_tokens"]
    assert [item["type"] for item in first["output"]] == ["reasoning", "message"]
    items = [{"role": "user", "content": "hello"}, *first["output"], {"role": "user", "content": "and?"}]
    assert http.post("/v1/responses", json={"input": items}).status_code == 200
    by_hand = fake_engine.submits[-1].token_ids
    assert http.post("/v1/responses", json={"input": "and?", "previous_response_id": first["id"]}).status_code == 200
    assert fake_engine.submits[-1].token_ids == by_hand
    message = http.post("/v1/messages", json=SURFACES["/v1/messages"]).json
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": message["content"]},
               {"role": "user", "content": "and?"}]  # fmt: skip
    assert http.post("/v1/messages", json={"messages": history, "max_tokens": 5}).status_code == 200
    assert fake_engine.submits[-1].token_ids == by_hand
