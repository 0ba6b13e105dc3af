"""The routes over the fake engine: shapes as the official client's types check them, errors, aborts."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pagegraph.runtime.ipc.protocol import Failed, TokenDelta, TokenLogprob
from pagegraph.runtime.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def events(body: bytes) -> list[Any]:
    """Events of an SSE body, checked to end with [DONE]; comments are dropped."""
    lines = [line for line in body.decode().split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def strict(model: type, value: Any) -> Any:
    """Validate with the official client's type, refusing wrong types; returns the typed value."""
    return model.model_validate_json(json.dumps(value), strict=True)


def test_chat_whole(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
    assert answer.status_code == 200, answer.json
    typed = strict(ChatCompletion, answer.json)
    assert typed.choices[0].message.content == "hello world"
    assert typed.choices[0].finish_reason == "stop"
    sent = fake_engine.submits[0]
    assert sent.token_ids == tokenizer.apply_chat(MESSAGES)
    assert sent.params.max_tokens == 128 - len(sent.token_ids)
    usage = typed.usage
    assert usage.prompt_tokens == len(sent.token_ids)
    assert usage.completion_tokens == len(tokenizer.encode("hello world")) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert answer.headers["x-request-id"]


def test_draft_tokens_are_in_the_usage(http: FlaskClient, fake_engine) -> None:
    """Deltas of several tokens, with totals of the sequence so far."""
    fake_engine.script = lambda s: [
        TokenDelta(s.request_id, [10, 11, 12], accepted=2, rejected=1),
        TokenDelta(s.request_id, [13]),
        TokenDelta(s.request_id, [14, 15], "length", accepted=3, rejected=5),
    ]
    body = {"model": "tiny", "messages": MESSAGES, "n": 2, "max_tokens": 6}
    usage = strict(ChatCompletion, http.post("/v1/chat/completions", json=body).json).usage
    assert usage.completion_tokens == 12
    details = usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (6, 10)


def test_chat_streamed(http: FlaskClient) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.mimetype == "text/event-stream"
    chunks = events(answer.data)
    for chunk in chunks:
        strict(ChatCompletionChunk, chunk)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert [c["choices"][0]["delta"] for c in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    texts = ["", ""]
    reasons = {}
    for chunk in chunks[2:-1]:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
            assert choice["delta"] == {}
    assert texts == ["hello world"] * 2 and reasons == {0: "stop", 1: "stop"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 2


def test_completion_whole_and_streamed_agree(http: FlaskClient) -> None:
    body = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "logprobs": 2, "max_tokens": 50}
    whole = http.post("/v1/completions", json=body).json
    typed = strict(Completion, whole)
    assert [choice.index for choice in typed.choices] == [0, 1, 2, 3]
    chunks = events(http.post("/v1/completions", json={**body, "stream": True}).data)
    for index in range(4):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == typed.choices[index].text == "hello world"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for part in parts if part["logprobs"] for item in part["logprobs"][name]]
            assert joined == whole["choices"][index]["logprobs"][name]
    logprobs = whole["choices"][0]["logprobs"]
    assert all(
        top[token] == max(top.values()) for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    )
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"][1] == len(logprobs["tokens"][0])


def test_chat_logprobs(http: FlaskClient) -> None:
    answer = http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    )
    content = strict(ChatCompletion, answer.json).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == "hello world<|end|>"
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob for entry in content)


@pytest.mark.parametrize("stop", [[], ["wo"]])
@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_lie_in_the_text(
    http: FlaskClient, fake_engine, tokenizer: Tokenizer, stop: list[str], stream: bool
) -> None:
    """Characters of several tokens, tokens that are not shown, and text that a stop string cut off."""
    ids = [*tokenizer.encode("\U0001f999"), 1, *tokenizer.encode("\u65e5hello world"), 1]
    assert len(tokenizer.encode("\U0001f999")) == 4
    fake_engine.script = lambda s: fake_engine.deltas(s, ids, stop_id=1)
    body = {"model": "tiny", "prompt": "a", "logprobs": 1, "max_tokens": 50, "stop": stop, "stream": stream}
    answer = http.post("/v1/completions", json=body)
    choices = [chunk["choices"][0] for chunk in events(answer.data)] if stream else answer.json["choices"]
    text, offsets, tokens = "", [], []
    for choice in choices:
        text += choice["text"]
        offsets += choice["logprobs"]["text_offset"]
        tokens += choice["logprobs"]["tokens"]
        assert max(offsets) <= len(text)
    assert text == "\U0001f999\u65e5hello " + ("" if stop else "world")
    assert offsets[:8] == [0, 0, 0, 0, 1, 1, 1, 1] and len(offsets) == len(tokens)
    shown = [
        (token, at)
        for token, at in zip(tokens, offsets)
        if not token.startswith(("bytes:", "<|end|>")) and at < len(text)
    ]
    assert shown and all(text[at:].startswith(token) or token.startswith(text[at:]) for token, at in shown)


def test_the_likeliest_come_first_and_the_sampled_token_where_it_belongs(
    http: FlaskClient, fake_engine, tokenizer: Tokenizer
) -> None:
    a, b, c = (tokenizer.encode(char)[0] for char in "abc")
    entries = [
        TokenLogprob(b, -1.0, 2, [a, b], [-0.5, -1.0]),
        TokenLogprob(c, -3.0, 3, [a, b], [-0.5, -1.0]),
        TokenLogprob(a, -0.5, 1, [a, b], [-0.5, -0.5]),
    ]
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [b, c, a], "length", logprobs=entries)]
    choice = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "logprobs": 2}).json["choices"][0]
    tops = [list(top.items()) for top in choice["logprobs"]["top_logprobs"]]
    assert tops == [[("a", -0.5), ("b", -1.0)], [("a", -0.5), ("b", -1.0), ("c", -3.0)], [("a", -0.5), ("b", -0.5)]]


def test_a_template_without_the_user_s_text_is_refused(
    make_app: Callable[..., Flask], tokenizer_folder, tmp_path
) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "silent")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    answer = make_app(model=str(folder)).test_client().post("/v1/chat/completions", json={"messages": MESSAGES})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "messages")
    assert "leaves out the content of messages[0]" in answer.json["error"]["message"]


def test_default_length_and_finish_reason(http: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: fake_engine.deltas(s, [10] * 200)
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "a"}).json
    assert answer["usage"]["completion_tokens"] == 16 and answer["choices"][0]["finish_reason"] == "length"


def test_stop_string_cuts_text_and_aborts(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [i]) for i in ids * 3]  # never ends by itself
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "a", "stop": ["rldh"], "max_tokens": 90, "stream": stream}
        answer = http.post("/v1/completions", json=body)
        choices = [c["choices"][0] for c in events(answer.data)] if stream else answer.json["choices"]
        assert "".join(choice["text"] for choice in choices) == "hello wo"
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "rldh")
    deadline = time.monotonic() + 5
    while len(fake_engine.aborts) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake_engine.aborts == [submit.request_id for submit in fake_engine.submits]


def test_stop_token_is_named_and_hidden(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    fake_engine.script = lambda s: fake_engine.deltas(s, ids, stop_id=ids[-1])
    body = {"model": "tiny", "prompt": "a", "stop_token_ids": [ids[-1]]}
    choice = http.post("/v1/completions", json=body).json["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("a", ids[-1])
    body["include_stop_str_in_output"] = True
    assert http.post("/v1/completions", json=body).json["choices"][0]["text"] == "ab"


def test_n_gets_consecutive_seeds(http: FlaskClient, fake_engine) -> None:
    for seed, expected in ((5, [5, 6, 7]), (2**63 - 2, [2**63 - 2, 2**63 - 1, -(2**63)])):
        fake_engine.submits.clear()
        assert http.post("/v1/completions", json={"prompt": "a", "n": 3, "seed": seed}).status_code == 200
        assert [submit.params.seed for submit in fake_engine.submits] == expected


def test_context_arithmetic(http: FlaskClient) -> None:
    long = http.post("/v1/completions", json={"model": "tiny", "prompt": [10] * 128})
    assert (long.status_code, long.json["error"]["code"]) == (400, "context_length_exceeded")
    assert "128" in long.json["error"]["message"] and "127" in long.json["error"]["message"]
    much = http.post("/v1/completions", json={"model": "tiny", "prompt": [10] * 120, "max_tokens": 9})
    assert much.json["error"]["param"] == "max_tokens" and "at most 8" in much.json["error"]["message"]
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": [10] * 120}).status_code == 200
    started = time.monotonic()
    huge = http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 4_000_000})
    assert huge.json["error"]["code"] == "context_length_exceeded" and time.monotonic() - started < 1
    for refused in (long, much, huge):
        assert refused.json["error"]["message"].startswith("This model's maximum context length is 128 tokens")
        assert refused.json["error"]["param"] in ("prompt", "max_tokens")


def test_what_the_model_sets_for_requests(http: FlaskClient, fake_engine) -> None:
    fake_engine.info = msgspec.structs.replace(
        fake_engine.info, sampling_defaults={"temperature": 0.6, "top_k": 20, "max_tokens": 9}
    )
    for body in ({}, {"temperature": 0.1, "top_k": None}, {"max_tokens": 30, "top_k": 0}):
        assert http.post("/v1/chat/completions", json={"messages": MESSAGES, **body}).status_code == 200
    sent = [(one.params.temperature, one.params.top_k, one.params.max_tokens) for one in fake_engine.submits]
    assert sent == [(0.6, 20, 9), (0.1, 20, 9), (0.6, 0, 30)]


def test_a_tiny_temperature_and_a_top_p_of_0_reach_the_engine_as_what_they_mean(http: FlaskClient, fake_engine) -> None:
    body = {"prompt": "a", "temperature": 1e-40, "top_p": 0}
    assert http.post("/v1/completions", json=body).status_code == 200
    params = fake_engine.submits[0].params
    assert (params.temperature, params.top_p) == (0, 0)


@pytest.mark.parametrize(("max_tokens", "output"), [(0, ""), (50, "hello world")])
def test_echo_puts_the_prompt_before_the_output(
    http: FlaskClient, fake_engine, tokenizer: Tokenizer, max_tokens: int, output: str
) -> None:
    asked = {"n": 2, "echo": True, "max_tokens": max_tokens, "stop": ["tiny"]}
    for prompt in (["a tiny", "b"], [tokenizer.encode("a tiny"), tokenizer.encode("b")]):
        whole = strict(Completion, http.post("/v1/completions", json={"prompt": prompt, **asked}).json)
        assert [choice.text for choice in whole.choices] == ["a tiny" + output] * 2 + ["b" + output] * 2
        assert {choice.finish_reason for choice in whole.choices} == {"stop" if output else "length"}
        assert (whole.usage.completion_tokens > 0) == bool(output) and whole.usage.prompt_tokens > 1
        chunks = events(http.post("/v1/completions", json={"prompt": prompt, **asked, "stream": True}).data)
        for index, choice in enumerate(whole.choices):
            parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(part["text"] for part in parts) == choice.text
            assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice.finish_reason]
    assert len(fake_engine.submits) == (16 if output else 0)


def test_usage_in_every_chunk(http: FlaskClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(http.post("/v1/completions", json={"prompt": "a", "stream": True, "stream_options": options}).data)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert len(counts) > 2 and counts == sorted(counts) and counts[0] > 0
    assert all(chunk["usage"]["total_tokens"] == 1 + count for chunk, count in zip(chunks, counts, strict=True))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_text_too_long_by_its_characters_is_not_tokenised(
    make_app: Callable[..., Flask], monkeypatch, path: str
) -> None:
    app = make_app()
    monkeypatch.setattr(app.extensions["pagegraph"].tokenizer, "encode", None)
    text = "hello " * 1_300_000
    body = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    started = time.monotonic()
    answer = app.test_client().post(path, json=body)
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "context_length_exceeded")
    assert answer.json["error"]["param"] == next(iter(body)) and "characters" in answer.json["error"]["message"]
    assert time.monotonic() - started < 2


def test_long_texts_are_tokenised_in_turn(make_app: Callable[..., Flask], fake_engine, monkeypatch) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, max_model_len=1 << 20)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    app = make_app(threads=4)  # two are kept free
    tokenizer = app.extensions["pagegraph"].tokenizer
    encode, inside, resume = tokenizer.encode, [], threading.Event()

    def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        inside.append(text)
        if len(text) > 1000:
            assert resume.wait(10)
        inside.pop()
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", slow)

    def post(text: str):
        return app.test_client().post("/v1/completions", json={"prompt": text, "max_tokens": 1})

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, "a" * 70_000)
        while not inside:
            time.sleep(0.01)
        second = pool.submit(post, "b" * 70_000)
        service = app.extensions["pagegraph"]
        while service._free_threads:  # a request now could take the second one's place
            time.sleep(0.01)
        assert post("c").status_code == 503 and len(inside) == 1
        resume.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    assert not fake_engine.aborts


def test_who_leaves_while_waiting_its_turn_is_not_tokenised(
    make_app: Callable[..., Flask], fake_engine, monkeypatch
) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, max_model_len=1 << 20)
    app = make_app(threads=2)
    monkeypatch.setattr("pagegraph.web.submit.client_probe", lambda environ: lambda: True)
    monkeypatch.setattr(app.extensions["pagegraph"].tokenizer, "encode", None)
    for _ in range(2):  # its thread is given back
        assert app.test_client().post("/v1/completions", json={"prompt": "a" * 70_000}).status_code == 499
    assert not fake_engine.submits


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("post", "/v1/chat/completions", {"model": "other", "messages": MESSAGES}, 404, "model_not_found"),
        ("post", "/v1/completions", {"model": "tiny", "prompt": "a", "temperature": 9}, 400, "invalid_value"),
        ("post", "/v1/completions", {"model": "tiny", "prompt": "\ud800"}, 400, None),
        ("post", "/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
        ("post", "/v1/completions", {"model": "\ud800", "prompt": "a"}, 404, "model_not_found"),
        ("post", "/v1/completions", {"prompt": "\ud800", "truncate_prompt_tokens": 5}, 400, None),
        ("post", "/v1/embeddings", {"input": ["a", "\ud800"], "truncate_prompt_tokens": -1}, 400, None),
        ("post", "/v1/completions", {"prompt": "a", "stop": ["\ud800"], "cache_salt": "\ud800"}, 400, "invalid_value"),
        ("post", "/v1/completions", {"model": "tiny", "prompt": ""}, 400, "invalid_value"),
        ("post", "/v1/chat/completions", {"messages": [{"role": "critic", "content": "x"}]}, 400, None),
        ("get", "/v1/models/other", None, 404, "model_not_found"),
        ("get", "/v1/nothing", None, 404, None),
        ("get", "//v1/models", None, 404, None),
        ("get", "/V1/models", None, 404, None),
        ("get", "/v1/completions", None, 405, None),
    ],
)
def test_errors_have_openai_s_shape(
    http: FlaskClient, method: str, path: str, body: Any, status: int, code: str | None
) -> None:
    answer = http.open(path, method=method.upper(), json=body)
    assert answer.status_code == status
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.json["error"]["code"] == code
    assert "x-request-id" in answer.headers


def test_content_type_and_body_limit(make_app: Callable[..., Flask]) -> None:
    http = make_app(max_body_bytes=1000).test_client()
    assert http.post("/v1/completions", data="{}").status_code == 415
    large = http.post("/v1/completions", json={"prompt": "x" * 2000})
    assert large.status_code == 413 and "1000" in large.json["error"]["message"]


def test_ignored_fields_header(http: FlaskClient) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "frob": 1, "new\r\nline": 2})
    assert answer.headers["x-ignored-fields"] == "frob, newline"
    assert "x-ignored-fields" not in http.post("/v1/completions", json={"prompt": "a"}).headers


def test_models(http: FlaskClient) -> None:
    listed = http.get("/v1/models").json
    assert listed["object"] == "list" and strict(Model, listed["data"][0]).id == "tiny"
    assert strict(Model, http.get("/v1/models/tiny").json).owned_by == "pagegraph"


def test_refusal_by_the_engine_is_a_status_even_when_streaming(http: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: [Failed(s.request_id, 503, "the queue is full", retry_after_s=11.2)]
    for stream in (False, True):
        answer = http.post("/v1/completions", json={"prompt": "a", "stream": stream})
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "12"
        assert answer.json["error"]["message"] == "the queue is full"


def test_a_refusal_that_comes_late_is_a_status_too(http: FlaskClient, fake_engine) -> None:
    """An engine in a long step answers after it: a stream does not begin before the engine has taken the request."""

    def refuse(submit) -> list[Failed]:
        time.sleep(0.5)
        return [Failed(submit.request_id, 503, "the queue is full")]

    fake_engine.script = refuse
    answer = http.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"


def test_who_leaves_before_the_engine_answers_is_given_up(http: FlaskClient, fake_engine, monkeypatch) -> None:
    monkeypatch.setattr("pagegraph.web.submit.client_probe", lambda environ: lambda: True)
    fake_engine.script = lambda s: time.sleep(0.5) or [TokenDelta(s.request_id, [10])]
    assert http.post("/v1/completions", json={"prompt": "a", "stream": True}).status_code == 499
    deadline = time.monotonic() + 5
    while not fake_engine.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(fake_engine.aborted) == [fake_engine.submits[0].request_id]


def test_failure_in_mid_stream_is_an_event(http: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10]), Failed(s.request_id, 500, "the step failed")]
    chunks = events(http.post("/v1/completions", json={"prompt": "a", "stream": True, "n": 2}).data)
    assert chunks[-1]["error"]["message"] == "the step failed"
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 500


def test_dead_engine_ends_streams_and_refuses(http: FlaskClient, fake_engine) -> None:
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10])]
    answer = http.post("/v1/completions", json={"prompt": "a", "stream": True})
    body = iter(answer.response)
    received = next(body)
    fake_engine.stop()
    received += b"".join(body)
    assert events(received)[-1]["error"]["type"] == "service_unavailable_error"
    refused = http.post("/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    assert refused.json["error"]["code"] == "engine_dead"


def test_quiet_stream_is_kept_alive_and_closing_aborts(make_app: Callable[..., Flask], fake_engine) -> None:
    http = make_app(keep_alive_s=0.05).test_client()
    fake_engine.script = lambda s: [TokenDelta(s.request_id, [10])]
    answer = http.post("/v1/completions", json={"prompt": "a", "stream": True})
    body = iter(answer.response)
    assert any(next(body) == b": keep-alive\n\n" for _ in range(5))
    answer.close()
    deadline = time.monotonic() + 5
    while not fake_engine.aborts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake_engine.aborts == [fake_engine.submits[0].request_id]


def test_stream_closed_before_it_began_gives_its_place_back(make_app: Callable[..., Flask], fake_engine) -> None:
    app = make_app(threads=2, enough_threads=320)  # one is kept free
    http = app.test_client()
    fake_engine.script = lambda s: []
    first = http.post("/v1/completions", json={"prompt": "a", "stream": True})
    full = http.post("/v1/completions", json={"prompt": "a"})
    assert full.status_code == 503 and "threads = 2; 320 (auto)" in full.json["error"]["message"]
    first.close()
    fake_engine.script = lambda s: fake_engine.deltas(s, [10])
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_the_queue_is_for_the_engine_to_refuse(make_app: Callable[..., Flask], fake_engine) -> None:
    """However many wait: what the worker knows of the queue is a second old, and other workers fill it too."""
    fake_engine.info = msgspec.structs.replace(fake_engine.info, num_running=32, num_waiting=10_000)
    assert make_app().test_client().post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_draining_refuses(make_app: Callable[..., Flask], fake_engine) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, draining=True)
    drained = make_app().test_client().post("/v1/completions", json={"prompt": "a"})
    assert drained.status_code == 503 and "shutting down" in drained.json["error"]["message"]


def test_an_unforeseen_error_shows_nothing(make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(app.extensions["pagegraph"].tokenizer, "encode", broken)
    answer = app.test_client().post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500 and "secret" not in answer.text
