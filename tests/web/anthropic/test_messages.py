"""/v1/messages over the fake engine: shapes of messages, events and errors, and what becomes of each field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.runtime.ipc.protocol import Failed, TokenDelta
from pagegraph.runtime.text.chat_output import CallArguments, CallBegin, Content, Part, Reasoning
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.web.anthropic.answer import Blocks
from pagegraph.web.anthropic.request import _read_messages
from pagegraph.web.fields import Fields

SAID = {"role": "user", "content": "hello"}
USAGE = {"input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens"}


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def create(http: FlaskClient, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/messages", json={"messages": [SAID], "max_tokens": 50, **fields})
    assert answer.status_code == 200, answer.json
    return answer.json


def stream(http: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    answer = http.post("/v1/messages", json={"messages": [SAID], "max_tokens": 50, "stream": True, **fields})
    assert answer.status_code == 200, answer.json
    events = []
    for block in answer.data.decode().split("\n\n")[:-1]:
        if not block.startswith(":"):
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def assembled(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells of, put together as a client does it."""
    message = events[0]["message"]
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            arguments = ""
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
        elif event["type"] == "content_block_stop":
            if message["content"][event["index"]]["type"] == "tool_use":
                message["content"][event["index"]]["input"] = json.loads(arguments or "{}")
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    return message


def prompt(fake_engine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(fake_engine.submits[-1].token_ids, skip_special=False)


def test_a_message(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    body = create(http, system=[{"type": "text", "text": "be brief", "cache_control": {}}], temperature=0.5, top_k=7)
    assert prompt(fake_engine, tokenizer) == "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>"
    sent = fake_engine.submits[-1]
    assert (sent.params.max_tokens, sent.params.temperature, sent.params.top_k) == (50, 0.5, 7)
    assert (body["type"], body["role"], body["model"], body["stop_sequence"]) == ("message", "assistant", "tiny", None)
    assert body["id"].startswith("msg_") and body["stop_reason"] == "end_turn"
    assert body["content"] == [{"type": "text", "text": "hello world"}]
    assert body["usage"].keys() == USAGE and body["usage"]["cache_read_input_tokens"] == 2
    assert body["usage"]["input_tokens"] + 2 == len(sent.token_ids)
    assert body["usage"]["output_tokens"] == len(tokenizer.encode("hello world")) + 1


def test_a_stream_tells_of_the_same_message(http: FlaskClient) -> None:
    events = stream(http)
    assert [event["type"] for event in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    assert assembled(events) | {"id": ""} == create(http) | {"id": ""}


@pytest.mark.parametrize("streamed", [False, True])
def test_why_it_stopped(http: FlaskClient, fake_engine, tokenizer: Tokenizer, streamed: bool) -> None:
    def stopped(**fields: Any) -> tuple[str, str | None]:
        body = assembled(stream(http, **fields)) if streamed else create(http, **fields)
        return body["stop_reason"], body["stop_sequence"]

    assert stopped(stop_sequences=["wor"]) == ("stop_sequence", "wor")
    assert stopped(max_tokens=2) == ("max_tokens", None)
    ids = tokenizer.encode("hello world " * 100)
    fake_engine.script = lambda submit: fake_engine.deltas(submit, ids, "length")
    assert stopped(max_tokens=100_000) == ("model_context_window_exceeded", None)  # more than the context has


def test_an_error_in_mid_stream(http: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10]), Failed(s.request_id, 503, "it broke")]
    *_, last = stream(http)
    assert last["type"] == "error" and last["error"] == {"type": "overloaded_error", "message": "it broke"}
    answer = http.post("/v1/messages", json={"messages": [SAID], "max_tokens": 5})
    assert (answer.status_code, answer.json["error"]["message"]) == (503, "it broke") and answer.headers["Retry-After"]


def test_count_tokens(http: FlaskClient, fake_engine) -> None:
    body = {"messages": [SAID], "system": "be brief"}
    counted = http.post("/v1/messages/count_tokens", json=body).json
    assert not fake_engine.submits
    usage = create(http, **body)["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_an_answer_goes_on_with_the_assistants_message(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    create(http, messages=[SAID, {"role": "assistant", "content": "the end"}])
    assert prompt(fake_engine, tokenizer).endswith("<|assistant|>the end")


CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1]}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "one"}]}


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ([SAID], [SAID]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
         [{"role": "user", "content": "a\nb"}]),
        ([{"role": "system", "content": "be"}, SAID], [{"role": "system", "content": "be"}, SAID]),
        (
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"},
                                               {"type": "redacted_thinking", "data": "x"},
                                               {"type": "text", "text": "so"}, CALL]},
             {"role": "user", "content": [RESULT, {"type": "text", "text": "go on"}]}],
            [{"role": "assistant", "content": "so", "reasoning_content": "hm", "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}]},
             {"role": "tool", "tool_call_id": "t1", "content": "one"}, {"role": "user", "content": "go on"}],
        ),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]}],
         [{"role": "tool", "tool_call_id": "t1", "content": ""}]),
        ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
    ],
)  # fmt: skip
def test_blocks_become_messages(given: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    chat: dict[str, Any] = {}
    _read_messages(Fields({"messages": given}), chat)
    assert chat["messages"] == messages


some_parts = st.one_of(
    st.builds(Reasoning, st.text(min_size=1)),
    st.builds(Content, st.text(min_size=1)),
    st.builds(CallBegin, st.just(0), st.text("abc", min_size=1), st.text("fg", min_size=1)),
)
some_arguments = st.dictionaries(st.text(), st.integers()).map(json.dumps)


@given(st.lists(st.tuples(some_parts, some_arguments)))
def test_any_stream_adds_up(parts: list[tuple[Part, str]]) -> None:
    blocks = Blocks()
    events: list[dict[str, Any]] = [{"message": {"content": []}}]
    for part, arguments in parts:
        events += list(blocks.add(part))
        if isinstance(part, CallBegin):
            for text in (arguments[:3], arguments[3:]):
                events += list(blocks.add(CallArguments(0, text)))
    events += list(blocks.close())
    kinds = [event["type"].removeprefix("content_block_") for event in events[1:]]
    assert kinds.count("start") == kinds.count("stop") == len(blocks.blocks)
    assert assembled(events)["content"] == blocks.blocks


def test_arguments_that_were_cut_off_are_an_empty_input() -> None:
    blocks = Blocks()
    for part in (CallBegin(0, "t1", "f"), CallArguments(0, '{"a": 1')):
        list(blocks.add(part))
    list(blocks.close())
    assert blocks.blocks[0]["input"] == {}


BAD = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [SAID] * 4097}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [SAID, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [CALL]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
     "messages[0].content[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": [{**CALL, "input": "a"}]}]}, "messages[0].content[0].input"),
    ({"messages": [{"role": "user", "content": "hello " * 500}]}, "This model's maximum context length"),
    ({"system": 3}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"stop_sequences": "a"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"temperature": 3}, "temperature"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": "a"}, "tools"),
    ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"container": "a"}, "container"),
    ({"compaction": {}}, "compaction"),
    ({"output_format": {"type": "xml"}}, "output_config.format"),
    ({"n": 2}, "n"),
    ({"stop": ["a"]}, "stop"),
]  # fmt: skip


def test_a_bad_field_is_named(http: FlaskClient) -> None:
    for fields, field in BAD:
        answer = http.post("/v1/messages", json={"messages": [SAID], "max_tokens": 5, **fields})
        assert answer.status_code == 400 and answer.json.keys() == {"type", "error", "request_id"}, fields
        assert answer.json["error"]["type"] == "invalid_request_error"
        message = answer.json["error"]["message"]
        assert message.startswith(f"{field} ") and len(message) < 500, (fields, message)
    assert not +http.application.extensions["pagegraph"]._threads_of  # every thread was given back


def test_what_has_no_effect_is_listed(http: FlaskClient) -> None:
    body = {
        "messages": [SAID, {"role": "user", "content": [{**RESULT, "is_error": True}]}, SAID],
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "metadata": {"user_id": "me"}, "service_tier": "auto",
        "max_tokens": 5,
    }  # fmt: skip
    answer = http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01", "anthropic-beta": "x"})
    assert answer.status_code == 200
    ignored = set(answer.headers["x-ignored-fields"].split(", "))
    assert ignored == {"messages.is_error", "thinking.budget_tokens", "service_tier"}


def test_errors_have_anthropics_shape(make_app: Callable[..., Flask]) -> None:
    http = make_app(api_key="s3cret", max_body_bytes=1000).test_client()
    good = {"messages": [SAID], "max_tokens": 5}
    for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"Authorization": "Bearer wrong"}):
        answer = http.post("/v1/messages", json=good, headers=headers)
        assert (answer.status_code, answer.json["error"]["type"]) == (401, "authentication_error")
        assert "s3cret" not in answer.text
    key = {"x-api-key": "s3cret"}
    for body, status, kind in (
        ({**good, "model": "other"}, 404, "not_found_error"),
        ({**good, "x": "y" * 1000}, 413, "request_too_large"),
        ({**good, "max_tokens": "a"}, 400, "invalid_request_error"),
    ):
        answer = http.post("/v1/messages", json=body, headers=key)
        assert (answer.status_code, answer.json["type"], answer.json["error"]["type"]) == (status, "error", kind)
        assert answer.headers["request-id"] == answer.headers["x-request-id"] == answer.json["request_id"]
    answer = http.post("/v1/messages", json=good, headers=key)
    assert answer.status_code == 200 and answer.headers["request-id"]
    assert http.get("/v1/models", headers=key).status_code == 200


def test_a_thread_is_refused_so_that_clients_send_the_whole_conversation(http: FlaskClient) -> None:
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        answer = http.post("/v1/messages", json={"messages": [SAID], "max_tokens": 5, "thread": thread})
        assert answer.status_code == 400 and answer.json["error"]["type"] == "invalid_request_error"
        assert answer.json["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": []}
    create(http, thread=None)


def test_an_engine_that_is_gone(make_app: Callable[..., Flask], fake_engine) -> None:
    http = make_app(silence_s=0.3).test_client()
    create(http)
    fake_engine.stop()
    answer = http.post("/v1/messages", json={"messages": [SAID], "max_tokens": 5})
    assert (answer.status_code, answer.json["error"]["type"]) == (503, "overloaded_error")
