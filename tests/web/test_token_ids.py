"""Fields that change what of the tokens an answer shows, or how much of a prompt is kept; ids of requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pagegraph.runtime.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
TEXT = "the end of the world is near 0123456789"


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def chunks(body: bytes) -> list[dict[str, Any]]:
    events = [line[6:] for line in body.decode().split("\n\n") if line.startswith("data: {")]
    return [json.loads(event) for event in events]


def reply_ids(fake_engine) -> list[int]:
    (submit,) = fake_engine.submits[-1:]
    return [token for delta in fake_engine.script(submit) for token in delta.token_ids]


def test_chat_shows_the_token_ids(http: FlaskClient, fake_engine) -> None:
    body = {"messages": MESSAGES, "return_token_ids": True}
    whole = http.post("/v1/chat/completions", json=body).json
    ChatCompletion.model_validate(whole)
    assert whole["prompt_token_ids"] == fake_engine.submits[-1].token_ids
    assert whole["choices"][0]["token_ids"] == reply_ids(fake_engine)
    parts = chunks(http.post("/v1/chat/completions", json={**body, "stream": True}).data)
    assert parts[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in part for part in parts[1:])
    assert sum((part["choices"][0]["token_ids"] for part in parts), []) == whole["choices"][0]["token_ids"]
    for part in parts:
        ChatCompletionChunk.model_validate(part)


def test_completions_show_the_token_ids_of_each_choice(http: FlaskClient, tokenizer: Tokenizer, fake_engine) -> None:
    body = {"prompt": ["hello", "world"], "n": 2, "return_token_ids": True, "stop": "world"}
    whole = http.post("/v1/completions", json=body).json
    Completion.model_validate(whole)
    prompts = [tokenizer.encode(text) for text in ("hello", "hello", "world", "world")]
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == prompts
    parts = [c["choices"][0] for c in chunks(http.post("/v1/completions", json={**body, "stream": True}).data)]
    for index, choice in enumerate(whole["choices"]):
        mine = [part for part in parts if part["index"] == index]
        assert mine[0]["prompt_token_ids"] == prompts[index]
        assert not any("prompt_token_ids" in part for part in mine[1:])
        # Also those whose text is held back, and those of the stop string.
        assert sum((part["token_ids"] for part in mine), []) == choice["token_ids"]
        assert tokenizer.decode(choice["token_ids"]) == "hello world"


def test_token_ids_are_not_shown_unasked(http: FlaskClient) -> None:
    for path, body in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "a"})):
        assert "token_ids" not in http.post(path, json=body).text
        assert b"token_ids" not in http.post(path, json={**body, "stream": True}).data


def test_tokens_of_logprobs_are_written_as_ids(http: FlaskClient, fake_engine) -> None:
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}
    content = http.post("/v1/chat/completions", json=body).json["choices"][0]["logprobs"]["content"]
    ids = reply_ids(fake_engine)
    assert [entry["token"] for entry in content] == [f"token_id:{one}" for one in ids]
    assert all(top["token"].startswith("token_id:") for entry in content for top in entry["top_logprobs"])
    body = {"prompt": "a", "logprobs": 2, "return_tokens_as_token_ids": True}
    logprobs = http.post("/v1/completions", json=body).json["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{one}" for one in ids]
    assert [token in tops for token, tops in zip(logprobs["tokens"], logprobs["top_logprobs"])] == [True] * len(ids)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 5}, slice(-5, None)),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, slice(5)),
        ({"truncate_prompt_tokens": 128, "max_tokens": 3}, slice(None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 3}, slice(None)),
    ],
)
def test_a_prompt_is_truncated(
    http: FlaskClient, fake_engine, tokenizer: Tokenizer, fields: dict[str, Any], kept: slice
) -> None:
    ids = tokenizer.encode(TEXT)
    for prompt in (TEXT, ids):
        answer = http.post("/v1/completions", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.json
        assert fake_engine.submits[-1].token_ids == ids[kept]
        assert answer.json["usage"]["prompt_tokens"] == len(ids[kept])


def test_minus_one_leaves_room_for_the_output(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    long = TEXT * 50
    ids = tokenizer.encode(long)
    for fields, room in (({"max_tokens": 20}, 20), ({"min_tokens": 9}, 9), ({}, 1)):
        body = {"prompt": long, "truncate_prompt_tokens": -1, **fields}
        assert http.post("/v1/completions", json=body).status_code == 200
        sent = fake_engine.submits[-1]
        assert sent.token_ids == ids[-(128 - room) :] and sent.params.max_tokens >= room
    body = {"messages": [{"role": "user", "content": long}], "truncate_prompt_tokens": 64}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert fake_engine.submits[-1].token_ids == http.post("/tokenize", json=body).json["tokens"]
    assert len(fake_engine.submits[-1].token_ids) == 64


def test_echo_shows_what_is_left_of_the_prompt(http: FlaskClient, tokenizer: Tokenizer) -> None:
    body = {"prompt": TEXT, "truncate_prompt_tokens": 4, "echo": True}
    (choice,) = http.post("/v1/completions", json=body).json["choices"]
    assert choice["text"] == tokenizer.decode(tokenizer.encode(TEXT)[-4:]) + "hello world"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 129}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 127, "max_tokens": 5}, "max_tokens"),  # what is kept leaves no room for them
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"truncation_side": ["left"]}, "truncation_side"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"return_tokens_as_token_ids": "yes"}, "return_tokens_as_token_ids"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": 4}, "request_id"),
        ({"suffix": "end"}, "suffix"),
    ],
)
def test_a_bad_value_is_named(http: FlaskClient, fields: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": TEXT * 20, "truncate_prompt_tokens": 3, **fields})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, field)


def test_request_ids(http: FlaskClient, fake_engine) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "request_id": "mine-1"})
    assert (answer.json["id"], answer.headers["x-request-id"]) == ("cmpl-mine-1", "mine-1")
    answer = http.post("/v1/completions", json={"prompt": "a", "request_id": "mine-1"}, headers={"X-Request-Id": "up"})
    assert (answer.json["id"], answer.headers["x-request-id"]) == ("cmpl-mine-1", "up")
    # The engine never sees them: equal ones do not meet.
    assert len({submit.request_id for submit in fake_engine.submits}) == 2
    assert not any("mine" in submit.request_id for submit in fake_engine.submits)
    for bad in ("a b", "x" * 129, "é", "a;b", ""):
        assert http.get("/v1/models", headers={"X-Request-Id": bad.encode()}).headers["x-request-id"] not in (bad, "")
