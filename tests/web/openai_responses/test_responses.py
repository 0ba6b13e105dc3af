"""/v1/responses over the fake engine: objects and events by the official client's types, the store, every refusal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from pagegraph.runtime.ipc.protocol import Failed, TokenDelta
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.web.openai_responses.store import Stored
from tests.web.web_process import eventually

EVENT = TypeAdapter(ResponseStreamEvent)
SAID = {"role": "user", "content": "hello"}


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def say(fake_engine, tokenizer: Tokenizer) -> Callable[..., None]:
    """Makes the engine answer every request with this text."""

    def say(text: str, finish: str = "stop") -> None:
        ids = tokenizer.encode(text)
        ids += [tokenizer.encode("<|end|>")[0]] if finish == "stop" else []
        stop_id = ids[-1] if finish == "stop" else -1
        fake_engine.script = lambda submit: fake_engine.deltas(submit, ids, finish, stop_id)

    return say


def strict(type: Any, value: Any) -> Any:
    return type.model_validate_json(json.dumps(value), strict=True)


def create(http: FlaskClient, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/responses", json={"input": "hello", **fields})
    assert answer.status_code == 200, answer.json
    strict(Response, answer.json)
    return answer.json


def stream(http: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked by its type and by its number."""
    answer = http.post("/v1/responses", json={"input": "hello", "stream": True, **fields})
    assert answer.status_code == 200, answer.json
    events = []
    for block in answer.data.decode().split("\n\n")[:-1]:
        if not block.startswith(":"):
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            EVENT.validate_json(data.removeprefix("data: "), strict=True)
            events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def prompt(fake_engine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(fake_engine.submits[-1].token_ids, skip_special=False)


def test_a_response(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    body = create(http, instructions="be brief", metadata={"a": "b"}, max_output_tokens=20, temperature=0.5, user="me")
    assert prompt(fake_engine, tokenizer) == "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>"
    sent = fake_engine.submits[-1]
    assert (sent.params.max_tokens, sent.params.temperature) == (20, 0.5)
    typed = strict(Response, body)
    assert typed.output_text == "hello world" and typed.status == "completed" and typed.error is None
    assert (typed.instructions, typed.metadata, typed.temperature, typed.user) == ("be brief", {"a": "b"}, 0.5, "me")
    usage = typed.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (len(sent.token_ids), 2)
    assert usage.output_tokens == len(tokenizer.encode("hello world")) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert body["id"].startswith("resp_") and body["output"][0]["id"].startswith("msg_")


def test_a_stream_tells_of_the_response_that_is_made_unstreamed(http: FlaskClient) -> None:
    whole = create(http)
    events = stream(http)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    created, done = events[0]["response"], events[-1]["response"]
    assert created["status"] == "in_progress" and created["output"] == [] and created["id"] == done["id"]
    assert "".join(event.get("delta", "") for event in events) == "hello world"
    differing = {"id", "created_at", "completed_at", "output"}
    assert {key: value for key, value in done.items() if key not in differing} == {
        key: value for key, value in whole.items() if key not in differing
    }
    assert [item | {"id": ""} for item in done["output"]] == [item | {"id": ""} for item in whole["output"]]
    assert events[-2]["item"] == done["output"][0]
    assert http.get(f"/v1/responses/{done['id']}").json == done


def test_an_answer_that_was_cut_off(http: FlaskClient, say) -> None:
    say("hello world and more", "length")
    body = create(http, max_output_tokens=2)
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete" and "completed_at" not in body
    events = stream(http, max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete" and events[-2]["item"]["status"] == "incomplete"


def test_an_answer_without_text_has_a_message(http: FlaskClient, say) -> None:
    say("")
    assert strict(Response, create(http)).output_text == ""
    assert [event["type"] for event in stream(http)][-1] == "response.completed"


def test_a_failure_in_mid_stream(http: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10]), Failed(s.request_id, 500, "it broke")]
    events = stream(http)
    error, failed = events[-2:]
    assert (error["type"], error["message"], failed["type"]) == ("error", "it broke", "response.failed")
    assert failed["response"]["status"] == "failed" and failed["response"]["error"]["message"] == "it broke"
    assert http.get(f"/v1/responses/{failed['response']['id']}").json["status"] == "failed"
    answer = http.post("/v1/responses", json={"input": "hello"})
    assert (answer.status_code, answer.json["error"]["message"]) == (500, "it broke")


@pytest.mark.parametrize("fields", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
def test_logprobs(http: FlaskClient, fields: dict[str, Any]) -> None:
    (part,) = create(http, **fields)["output"][0]["content"]
    tops = fields.get("top_logprobs", 0)
    assert len(part["logprobs"]) == 2 and all(len(entry["top_logprobs"]) == tops for entry in part["logprobs"])
    events = stream(http, **fields)
    streamed = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    done = next(event for event in events if event["type"] == "response.output_text.done")["logprobs"]
    assert streamed == done == part["logprobs"]


HISTORY = [
    {"role": "developer", "content": [{"type": "input_text", "text": "be"}, {"type": "input_text", "text": "kind"}]},
    {"type": "message", "role": "user", "content": "one"},
    {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
     "content": [{"type": "output_text", "text": "two", "annotations": []}]},
    {"role": "assistant", "content": "three"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    SAID,
]  # fmt: skip


def test_a_history_becomes_messages(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    create(http, input=HISTORY)
    assert prompt(fake_engine, tokenizer) == (
        "<|developer|>be\nkind<|end|><|user|>one<|end|><|assistant|>two<|end|><|assistant|>three<|end|>"
        "<|assistant|>no<|end|><|user|>hello<|end|><|assistant|>"
    )


def test_the_oldest_turns_are_left_out(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    turns = [("user", "one " * 12), ("assistant", "two"), ("assistant", "more"), ("user", "three"), ("assistant", "4"),
             ("user", "five")]  # fmt: skip
    fields: dict[str, Any] = {
        "instructions": "be brief", "input": [{"role": role, "content": text} for role, text in turns],
    }  # fmt: skip
    whole = http.post("/v1/responses/input_tokens", json=fields).json["input_tokens"]

    def left(room: int) -> str:
        """The conversation that is left where the answer takes all but `room` tokens."""
        body = create(http, **fields, truncation="auto", max_output_tokens=128 - room)
        assert body["truncation"] == "auto" and body["usage"]["input_tokens"] <= room
        return prompt(fake_engine, tokenizer)

    system, end = "<|system|>be brief<|end|>", "<|user|>five<|end|><|assistant|>"
    assert left(whole).startswith(f"{system}<|user|>one one")
    assert left(whole - 1) == f"{system}<|user|>three<|end|><|assistant|>4<|end|>{end}"
    shorter = len(fake_engine.submits[-1].token_ids)
    assert left(shorter).count("<|user|>") == 2
    assert left(shorter - 1) == system + end
    assert len(fake_engine.submits) == 4


def test_a_response_goes_on_from_a_stored_one(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    first = create(http, instructions="be brief")
    second = create(http, input="and?", previous_response_id=first["id"])
    assert prompt(fake_engine, tokenizer) == (  # without the instructions
        "<|user|>hello<|end|><|assistant|>hello world<|end|><|user|>and?<|end|><|assistant|>"
    )
    assert second["previous_response_id"] == first["id"]
    http.delete(f"/v1/responses/{first['id']}")
    create(http, input="so?", previous_response_id=second["id"])  # it holds what came before
    assert prompt(fake_engine, tokenizer).count("<|end|>") == 5
    reference = {"type": "item_reference", "id": second["output"][0]["id"]}
    create(http, input=[SAID, reference, SAID])
    assert "<|assistant|>hello world<|end|>" in prompt(fake_engine, tokenizer)


def test_another_process_finds_it(make_app: Callable[..., Flask], tmp_path) -> None:
    path = str(tmp_path / "shared.sqlite")
    first, second = (make_app(response_store=path).test_client() for _ in range(2))
    body = create(first)
    assert second.get(f"/v1/responses/{body['id']}").json == body
    create(second, previous_response_id=body["id"])
    assert second.delete(f"/v1/responses/{body['id']}").json == {
        "id": body["id"], "object": "response", "deleted": True,
    }  # fmt: skip
    assert first.get(f"/v1/responses/{body['id']}").status_code == 404


def test_what_is_not_stored_is_not_found(make_app: Callable[..., Flask]) -> None:
    http = make_app().test_client()
    off = make_app(response_store_bytes=0).test_client()
    small = make_app(response_store_bytes=100).test_client()
    for client, body in ((http, create(http, store=False)), (off, create(off)), (small, create(small))):
        assert body["store"] is False
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            answer = client.open(f"/v1/responses/{body['id']}{path}", method=method)
            assert (answer.status_code, answer.json["error"]["param"]) == (404, "response_id")
        answer = client.post("/v1/responses", json={"input": "a", "previous_response_id": body["id"]})
        assert (answer.status_code, answer.json["error"]["code"]) == (400, "previous_response_not_found")
    assert off.post("/v1/responses", json={"input": "a", "background": True}).status_code == 400


def test_a_full_store_refuses_nothing_and_forgets_the_oldest(make_app: Callable[..., Flask]) -> None:
    http = make_app(response_store_bytes=20_000).test_client()
    texts = [os.urandom(4).hex() for _ in range(60)]
    bodies = [create(http, input=texts[0])]
    for text in texts[1:]:
        bodies.append(create(http, input=text, previous_response_id=bodies[-1]["id"] if len(bodies) % 4 else None))
    assert all(body["store"] for body in bodies)
    found = [http.get(f"/v1/responses/{body['id']}") for body in bodies]
    codes = [answer.status_code for answer in found]
    kept = codes.count(200)
    assert 5 < kept < 55 and codes == [404] * (60 - kept) + [200] * kept  # the newest
    assert [answer.json for answer in found[60 - kept :]] == bodies[60 - kept :]
    gone = bodies[0]["id"]
    answer = http.post("/v1/responses", json={"input": "a", "previous_response_id": gone})
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "previous_response_not_found")
    answer = http.post(
        "/v1/responses", json={"input": [{"type": "item_reference", "id": bodies[0]["output"][0]["id"]}]}
    )
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "input[0].id")
    assert stream(http, previous_response_id=bodies[-1]["id"])[-1]["type"] == "response.completed"
    done = wait_for(http, create(http, background=True)["id"], "completed")
    assert done["store"] and threads_are_back(http)


def test_input_items_in_pages(http: FlaskClient) -> None:
    id = create(http, input=HISTORY)["id"]
    path = f"/v1/responses/{id}/input_items"
    typed = strict(ResponseItemList, http.get(path).json)
    assert not typed.has_more and [item.type for item in typed.data] == ["message"] * 6
    assert typed.data[0].content[0].text == "hello" and typed.first_id == typed.data[0].id
    ids = [item["id"] for item in http.get(f"{path}?order=asc").json["data"]]
    assert ids == [item.id for item in typed.data[::-1]] and ids[2] == "msg_1"
    page = http.get(f"{path}?order=asc&limit=2&after={ids[1]}").json
    assert [item["id"] for item in page["data"]] == ids[2:4] and page["has_more"] and page["last_id"] == ids[3]
    assert http.get(f"{path}?after={ids[0]}").json["data"] == []
    for query, field in (("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order"),
                         ("after=msg_x", "after"), ("limit=-1", "limit"), ("limit=%C2%B2", "limit")):  # fmt: skip
        answer = http.get(f"{path}?{query}")
        assert (answer.status_code, answer.json["error"]["param"]) == (400, field)
    assert http.get(f"/v1/responses/{id}?stream=true").json["error"]["param"] == "stream"


def test_input_tokens(http: FlaskClient, fake_engine) -> None:
    fields = {"input": HISTORY, "instructions": "be brief"}
    counted = strict(InputTokenCountResponse, http.post("/v1/responses/input_tokens", json=fields).json)
    assert not fake_engine.submits
    assert counted.input_tokens == create(http, **fields)["usage"]["input_tokens"]


def wait_for(http: FlaskClient, id: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while (body := http.get(f"/v1/responses/{id}").json)["status"] != status:
        assert time.monotonic() < deadline, body
        time.sleep(0.02)
    strict(Response, body)
    return body


def threads_are_back(http: FlaskClient) -> bool:
    service = http.application.extensions["pagegraph"]
    deadline = time.monotonic() + 5
    while +service._threads_of and time.monotonic() < deadline:
        time.sleep(0.02)
    return not +service._threads_of


def test_a_response_in_the_background(http: FlaskClient) -> None:
    begun = create(http, background=True)
    assert (begun["status"], begun["background"], begun["output"]) == ("in_progress", True, [])
    done = wait_for(http, begun["id"], "completed")
    assert strict(Response, done).output_text == "hello world" and threads_are_back(http)
    assert http.post(f"/v1/responses/{begun['id']}/cancel").status_code == 400


def test_a_background_response_fails_by_itself(http: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10]), Failed(s.request_id, 500, "it broke")]
    failed = wait_for(http, create(http, background=True)["id"], "failed")
    assert failed["error"]["message"] == "it broke" and threads_are_back(http)


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_background_response_is_ended(http: FlaskClient, fake_engine, end: str) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10])]  # and no more
    begun = create(http, background=True)
    path = f"/v1/responses/{begun['id']}"
    answer = http.post("/v1/responses", json={"input": "a", "previous_response_id": begun["id"]})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "previous_response_id")
    if end == "cancel":
        assert http.post(f"{path}/cancel").json["status"] == "cancelled"
        assert http.post(f"{path}/cancel").json["status"] == "cancelled"
    else:
        assert http.delete(path).status_code == 200
    assert threads_are_back(http) and eventually(lambda: fake_engine.aborts == [fake_engine.submits[0].request_id])
    found = http.get(path)
    assert found.json["status"] == "cancelled" if end == "cancel" else found.status_code == 404


def test_a_background_response_whose_process_died_has_failed(http: FlaskClient) -> None:
    body = create(http) | {"status": "in_progress", "output": []}
    dead = os.spawnlp(os.P_WAIT, "true", "true")  # 0: no process of ours
    assert dead == 0
    store = http.application.extensions["pagegraph"].responses
    store.put(Stored(body, [], [], owner=2**22 + 1))
    found = http.get(f"/v1/responses/{body['id']}").json
    assert found["status"] == "failed" and "ended" in strict(Response, found).error.message


BAD = [
    ({"input": None}, "input"),
    ({"input": 3}, "input"),
    ({"input": []}, "input"),
    ({"input": [3]}, "input[0]"),
    ({"input": [{"role": "user", "content": "a"}] * 4097}, "input"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [SAID, {"type": "web_search_call", "id": "a"}]}, "input[1].type"),
    ({"input": [{"type": ["a"]}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    ({"input": [{"type": "reasoning", "summary": "a"}]}, "input[0].summary"),
    ({"input": [{"type": "reasoning", "summary": [], "content": [{"type": "a"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id"),
    ({"input": [{"id": 3}]}, "input[0].id"),
    ({"instructions": 3}, "instructions"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {str(i): "a" for i in range(17)}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 1000}, "max_output_tokens"),
    ({"input": "hello " * 500}, "input"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"include": ["everything"]}, "include[0]"),
    ({"include": "a"}, "include"),
    ({"truncation": "some"}, "truncation"),
    ({"truncation": "auto", "input": "hello " * 500}, "input"),
    ({"truncation": "auto", "input": "hello\ud800"}, "input"),
    ({"include": ["message.output_text.logprobs"] * 65}, "include"),
    ({"temperature": 3}, "temperature"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "mcp", "server_label": "a"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {}}, 3]}, "tools[1].type"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": 3}, "text"),
    ({"reasoning": "high"}, "reasoning"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"store": 1}, "store"),
    ({"background": True, "stream": True}, "background"),
    ({"background": True, "store": False}, "background"),
    ({"previous_response_id": 3}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"messages": [SAID]}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"user": "a" + "\ud800"}, "user"),
    ({"instructions": "\ud800"}, "instructions"),
    ({"input": [SAID, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "\ud800"}]}]}, "input[1]"),
    ({"input": [SAID, {"type": "function_call_output", "call_id": "\ud800", "output": "a"}]}, "input[1]"),
    ({"previous_response_id": "resp_\ud800"}, "previous_response_id"),
    ({"input": [{"type": "item_reference", "id": "\ud800"}]}, "input[0].id"),
]


def test_a_bad_field_is_named_as_it_is_called_here(http: FlaskClient) -> None:
    for fields, field in BAD:
        answer = http.post("/v1/responses", json={"input": "hello", **fields})
        assert answer.status_code == 400, fields
        error = answer.json["error"]
        assert error["param"] == field and len(error["message"]) < 500, (fields, error)
        assert "max_completion_tokens" not in error["message"]
    assert threads_are_back(http)


def test_too_long_is_told_in_the_names_of_this_route(http: FlaskClient) -> None:
    answer = http.post("/v1/responses", json={"input": "hello", "max_output_tokens": 1000})
    message = answer.json["error"]["message"]
    assert "tokens of input + max_output_tokens 1000" in message and answer.json["error"]["code"]


def test_what_has_no_effect_is_listed(http: FlaskClient) -> None:
    body = {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}, "service_tier": "auto",
            "n": 1, "max_tool_calls": 3, "unheard": 1}  # fmt: skip
    answer = http.post("/v1/responses", json={"input": "hello", **body})
    assert answer.status_code == 200
    ignored = set(answer.headers["x-ignored-fields"].split(", "))
    assert ignored == {"include.reasoning.encrypted_content", "reasoning.summary", "service_tier", "unheard"}
    assert answer.json["max_tool_calls"] == 3


def test_other_errors(http: FlaskClient) -> None:
    assert http.post("/v1/responses", json={"input": "a", "model": "other"}).status_code == 404
    assert http.post("/v1/responses", data="{").status_code == 415
    assert http.put("/v1/responses", json={}).status_code == 405
    assert http.get("/v1/responses/../../etc/passwd").status_code == 404
    assert http.get("/v1/responses/" + "x" * 3000).status_code == 404
