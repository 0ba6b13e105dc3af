"""Reasoning and tools on every surface that answers a chat: the same parts, each in the surface's own shape, streamed or not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.runtime.ipc.protocol import Failed, TokenDelta
from pagegraph.runtime.text.tokenizer import Tokenizer

SURFACES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 300},
}
THOUGHT, SAID = "the end is near", "hello world"


@pytest.fixture
def say(fake_engine, tokenizer_folder) -> Callable[..., None]:
    tokenizer = Tokenizer.load(tokenizer_folder)

    def say(text: str, cut: bool = False) -> None:
        ids = tokenizer.encode(text)
        if not cut:
            ids.append(tokenizer.encode("<|end|>")[0])
        ended = ("length", -1) if cut else ("stop", ids[-1])
        fake_engine.script = lambda submit: fake_engine.deltas(submit, ids, *ended)

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
    texts = {item["type"]: item["content"][0]["text"] for item in body["output"] if "content" in item}
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


# tools

SCHEMA = {"properties": {"a": {"type": "integer"}}, "type": "object"}
TOOL = {"name": "f", "description": "adds one"}
TOOLS: dict[str, Any] = {
    "/v1/chat/completions": [{"type": "function", "function": TOOL | {"parameters": SCHEMA}}],
    "/v1/responses": [{"type": "function", **TOOL, "parameters": SCHEMA}],
    "/v1/messages": [TOOL | {"input_schema": SCHEMA}],
}
CALL = """<tool_call>
{"name": "f", "arguments": {"a": 1}}
</tool_call>"""
CALLING = f"""<think>hm</think>so {CALL}
<tool_call>
{{"name": "f", "arguments": {{"a": 2}}}}
</tool_call>"""


@pytest.fixture
def tools(make_app: Callable[..., Flask], fake_engine) -> FlaskClient:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, max_model_len=4096)
    return make_app(reasoning_parser="qwen3", tool_call_parser="hermes").test_client()


def called(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of the calls of an answer; each has an id, and the tool's name."""
    if path == "/v1/chat/completions":
        calls = [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
                 for call in body["choices"][0]["message"].get("tool_calls", [])]  # fmt: skip
    elif path == "/v1/messages":
        calls = [(block["id"], block["name"], block["input"]) for block in body["content"]
                 if block["type"] == "tool_use"]  # fmt: skip
    else:
        calls = [(item["call_id"], item["name"], json.loads(item["arguments"])) for item in body["output"]
                 if item["type"] == "function_call"]  # fmt: skip
    assert all(id and name == "f" for id, name, _ in calls) and len({id for id, _, _ in calls}) == len(calls)
    return [arguments for _, _, arguments in calls]


def ended(path: str, body: dict[str, Any]) -> str:
    if path == "/v1/chat/completions":
        return body["choices"][0]["finish_reason"]
    return body["stop_reason"] if path == "/v1/messages" else body["status"]


@pytest.mark.parametrize("path", SURFACES)
def test_calls_have_their_place(tools: FlaskClient, say, fake_engine, path: str) -> None:
    say(CALLING)
    asked = {**SURFACES[path], "tools": TOOLS[path]}
    body = tools.post(path, json=asked).json
    assert parts(path, body) == ("hm", "so") and called(path, body) == [{"a": 1}, {"a": 2}]
    assert ended(path, body) == {"/v1/messages": "tool_use", "/v1/responses": "completed"}.get(path, "tool_calls")
    assert streamed(path, tools.post(path, json={**asked, "stream": True}).data) == ("hm", "so")
    single = {"/v1/messages": {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}}
    body = tools.post(path, json=asked | single.get(path, {"parallel_tool_calls": False})).json
    assert called(path, body) == [{"a": 1}]
    none = {"/v1/messages": {"tool_choice": {"type": "none"}}}.get(path, {"tool_choice": "none"})
    assert called(path, tools.post(path, json=asked | none).json) == []


@pytest.mark.parametrize("path", SURFACES)
@pytest.mark.parametrize(("said", "calls"), [('<tool_call>\n{"name": "f", "arg', []), (f"{CALL}\n<tool_c", [{"a": 1}])])
def test_a_call_that_has_to_come_and_is_cut_short_is_no_content(
    tools: FlaskClient, say, path: str, said: str, calls: list[dict[str, int]]
) -> None:
    say(f"<think>hm</think>{said}", cut=True)
    asked = {**SURFACES[path], "tools": TOOLS[path], "tool_choice": CHOICES[path]["required"]}
    body = tools.post(path, json=asked).json
    assert parts(path, body)[0] == "hm" and not parts(path, body)[1] and called(path, body) == calls
    short = {"/v1/messages": "model_context_window_exceeded", "/v1/responses": "incomplete"}  # max_tokens is far off
    assert ended(path, body) == short.get(path, "length")
    assert streamed(path, tools.post(path, json={**asked, "stream": True}).data) == ("hm", "")
    auto = {key: value for key, value in asked.items() if key != "tool_choice"}
    assert parts(path, tools.post(path, json=auto).json)[1] == said.removeprefix(CALL).strip()


def test_a_conversation_with_calls_has_one_prompt_on_every_surface(tools: FlaskClient, say, fake_engine) -> None:
    say(CALLING)
    prompts = []
    first = tools.post("/v1/responses", json={**SURFACES["/v1/responses"], "tools": TOOLS["/v1/responses"]}).json
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "three"} for call in calls]
    more = {"tools": TOOLS["/v1/responses"]}
    said = [{"role": "user", "content": "hello"}]
    for fields in ({"input": results, "previous_response_id": first["id"]},
                   {"input": [*said, *first["output"], *results]}):  # fmt: skip
        assert tools.post("/v1/responses", json=fields | more).status_code == 200
        prompts.append(fake_engine.submits[-1].token_ids)
    blocks = [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "so"}]
    blocks += [{"type": "tool_use", "id": call["call_id"], "name": "f", "input": json.loads(call["arguments"])}
               for call in calls]  # fmt: skip
    results = [{"type": "tool_result", "tool_use_id": call["call_id"], "content": "three"} for call in calls]
    messages = [*said, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    body = {"messages": messages, "tools": TOOLS["/v1/messages"], "max_tokens": 5}
    assert tools.post("/v1/messages", json=body).status_code == 200
    prompts.append(fake_engine.submits[-1].token_ids)
    assert tools.post("/v1/messages/count_tokens", json=body).json == {"input_tokens": len(prompts[0])}
    made = [{"id": call["call_id"], "type": "function", "function": {"name": "f", "arguments": call["arguments"]}}
            for call in calls]  # fmt: skip
    history = [{"role": "assistant", "content": "so", "reasoning": "hm", "tool_calls": made}]
    history += [{"role": "tool", "tool_call_id": call["call_id"], "content": "three"} for call in calls]
    # The test client itself sorts keys when it writes JSON.
    data = json.dumps({"messages": [*said, *history], "tools": TOOLS["/v1/chat/completions"]})
    assert tools.post("/v1/chat/completions", data=data, content_type="application/json").status_code == 200
    prompts.append(fake_engine.submits[-1].token_ids)
    answer = tools.post("/tokenize", data=data, content_type="application/json")
    assert answer.json["tokens"] == prompts[0]
    assert prompts[1:] == prompts[:1] * 3


@pytest.mark.parametrize("path", SURFACES)
def test_bad_tools_are_named_as_the_surface_calls_them(tools: FlaskClient, path: str) -> None:
    (good,) = TOOLS[path]
    nested = path == "/v1/chat/completions"
    schema = {"/v1/chat/completions": "function.parameters", "/v1/messages": "input_schema"}.get(path, "parameters")
    bad_schema = good | {"input_schema": 3, "parameters": 3}
    bad_name = good | {"name": "a b"}
    if nested:
        bad_schema, bad_name = good | {"function": bad_schema | TOOL}, good | {"function": {"name": "a b"}}
    for tool, field in ((bad_schema, f"tools[1].{schema}"),
                        (bad_name, "tools[1].function.name" if nested else "tools[1].name")):  # fmt: skip
        answer = tools.post(path, json={**SURFACES[path], "tools": [good, tool]})
        assert answer.status_code == 400 and answer.json["error"]["message"].startswith(field + " "), answer.json


def test_advice_that_the_template_does_not_read_is_listed_under_its_own_name(tools: FlaskClient) -> None:
    for path, fields, name in (
        ("/v1/responses", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("/v1/messages", {"output_config": {"effort": "high"}}, "output_config.effort"),
        ("/v1/chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
    ):
        answer = tools.post(path, json=SURFACES[path] | fields)
        assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == name


def held(tools: FlaskClient, fake_engine, path: str, fields: dict[str, Any]) -> Any:
    """What an answer is held to."""
    answer = tools.post(path, json=SURFACES[path] | fields)
    assert answer.status_code == 200, answer.json
    return fake_engine.submits[-1].params.structured_outputs


CHOICES = {
    "/v1/chat/completions": {"required": "required", "f": {"type": "function", "function": {"name": "f"}}},
    "/v1/responses": {"required": "required", "f": {"type": "function", "name": "f"}},
    "/v1/messages": {"required": {"type": "any"}, "f": {"type": "tool", "name": "f"}},
}
FORMATS = {
    "/v1/chat/completions": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    },
    "/v1/responses": {"text": {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}},
    "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
}


def test_calls_that_have_to_come_and_forms_are_the_same_on_every_surface(tools: FlaskClient, fake_engine) -> None:
    for choice in ("required", "f"):
        found = [
            held(tools, fake_engine, path, {"tools": TOOLS[path], "tool_choice": CHOICES[path][choice]})
            for path in SURFACES
        ]
        assert found[0] is not None and found == found[:1] * 3
    found = [held(tools, fake_engine, path, FORMATS[path]) for path in SURFACES]
    assert found[0] is not None and found == found[:1] * 3
    found = [held(tools, fake_engine, path, {"structured_outputs": {"choice": ["a", "b"]}}) for path in SURFACES]
    assert found[0] is not None and found == found[:1] * 3
    assert held(tools, fake_engine, "/v1/responses", {"text": {"format": {"type": "json_object"}}}) is not None


def test_a_bad_schema_is_named_as_the_surface_calls_it(tools: FlaskClient) -> None:
    bad = {"properties": {"a": {"type": "what"}}}
    for path, fields, field in (
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "a", "schema": bad}}}, "text.format.schema"),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": bad}}},
         "output_config.format.schema"),
        ("/v1/responses", {"tools": [TOOLS["/v1/responses"][0] | {"parameters": bad}], "tool_choice": "required"},
         "tools[0].parameters"),
        ("/v1/messages", {"tools": [TOOLS["/v1/messages"][0] | {"input_schema": bad}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema"),
        ("/v1/messages", {"tools": TOOLS["/v1/messages"], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ("/v1/responses", {"tool_choice": "required"}, "tool_choice"),
    ):  # fmt: skip
        answer = tools.post(path, json=SURFACES[path] | fields)
        assert answer.status_code == 400 and answer.json["error"]["message"].startswith(field), answer.json


FORM = {"/v1/chat/completions": "response_format.json_schema.schema", "/v1/responses": "text.format.schema",
        "/v1/messages": "output_config.format.schema"}  # fmt: skip
ASKED = [
    *((path, FORMATS[path], FORM[path]) for path in SURFACES),
    *((path, {"tools": TOOLS[path], "tool_choice": CHOICES[path]["required"]}, "tools") for path in SURFACES),
    *((path, {name: value}, field)
      for path in (*SURFACES, "/v1/completions")
      for name, value, field in (("grammar", 'root ::= "a"', "grammar"), ("guided_regex", "a", "guided_regex"),
                                 ("json_schema", {}, "json_schema"),
                                 ("structured_outputs", {"choice": ["a"]}, "structured_outputs.choice"))),
    ("/v1/completions", FORMATS["/v1/chat/completions"], FORM["/v1/chat/completions"]),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    ("/v1/responses", {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ("/v1/chat/completions", {"functions": [TOOL], "function_call": {"name": "f"}}, "functions"),
    ("/v1/chat/completions", FORMATS["/v1/chat/completions"] | {"tools": TOOLS["/v1/chat/completions"]},
     FORM["/v1/chat/completions"]),
]  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("path", "fields", "field"), ASKED)
def test_what_the_engine_finds_is_named_as_the_surface_calls_it(
    tools: FlaskClient, fake_engine, path: str, fields: dict[str, Any], field: str, late: bool
) -> None:
    """Before the first token, or at one, of an answer or of a stream; the engine knows of structured_outputs alone."""
    problem = "cannot be served on: its tokens take too long" if late else "cannot be served: it is too large"
    words = "structured_outputs" if late else "structured_outputs.grammar"
    failed = Failed("", 400, f"{words} {problem}", field=words)
    before = [TokenDelta("", [10])] if late else []
    fake_engine.script = lambda submit: [
        msgspec.structs.replace(one, request_id=submit.request_id) for one in [*before, failed]
    ]
    asked = SURFACES.get(path, {"prompt": "hello"}) | fields
    answer = tools.post(path, json=asked)
    assert answer.status_code == 400, answer.json
    _names(answer.json["error"], field, problem)
    data = tools.post(path, json=asked | {"stream": True}).data.decode()
    events = [json.loads(line.removeprefix("data: ")) for line in data.split("\n") if '"error' in line and "{" in line]
    errors = [event["response"]["error"] if "response" in event else event.get("error", event) for event in events]
    _names(errors[-1], field, problem)


def _names(error: dict[str, Any], field: str, problem: str) -> None:
    assert error["message"] == f"{field} {problem}"
    assert error.get("param", field) == field  # Anthropic's shape has none


def test_what_the_engine_finds_of_a_background_response_is_named(tools: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: [
        TokenDelta(s.request_id, [10]),
        Failed(s.request_id, 500, "structured_outputs failed for this request", field="structured_outputs"),
    ]
    id = tools.post("/v1/responses", json={"input": "a", "background": True} | FORMATS["/v1/responses"]).json["id"]
    deadline = time.monotonic() + 10
    while (body := tools.get(f"/v1/responses/{id}").json)["status"] == "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert body["error"]["message"] == "text.format.schema failed for this request"
