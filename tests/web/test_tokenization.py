"""/tokenize, /detokenize and /tokenizer_info: vLLM's shapes, the chat endpoint's tokens, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.runtime.text.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def test_a_text_and_its_tokens(http: FlaskClient, tokenizer: Tokenizer) -> None:
    answer = http.post("/tokenize", json={"model": "tiny", "prompt": "hello wörld", "return_token_strs": True}).json
    ids = tokenizer.encode("hello wörld")
    assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["max_model_len"] == 128
    assert [tokenizer._backend.token_to_id(text) for text in answer["token_strs"]] == ids
    assert http.post("/tokenize", json={"prompt": "hello"}).json["token_strs"] is None
    assert http.post("/detokenize", json={"model": "tiny", "tokens": ids}).json == {"prompt": "hello wörld"}
    assert http.post("/detokenize", json={"tokens": []}).json == {"prompt": ""}


def test_special_tokens_are_added_and_shown(make_app: Callable[..., Flask], tokenizer_folder, tmp_path) -> None:
    copy = tmp_path / "with-bos"
    copy.mkdir()
    (copy / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text())
    (copy / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "add_bos_token": true, "tokenizer_class": "LlamaTokenizerFast"}'
    )
    http = make_app(model=str(copy)).test_client()
    with_bos = http.post("/tokenize", json={"prompt": "hello"}).json["tokens"]
    without = http.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json["tokens"]
    assert with_bos[1:] == without
    assert http.post("/detokenize", json={"tokens": with_bos}).json["prompt"] == "<s>hello"
    assert http.post("/tokenize", json={"content": "hello"}).json["tokens"] == without  # llama.cpp's field and default
    assert http.post("/tokenize", json={"content": "hello", "add_special": True}).json["tokens"] == with_bos
    assert http.get("/tokenizer_info").json["tokenizer_class"] == "LlamaTokenizerFast"


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"add_special_tokens": True}])
def test_a_chat_has_the_tokens_that_chat_completions_sends(
    http: FlaskClient, fake_engine, options: dict[str, Any]
) -> None:
    tokens = http.post("/tokenize", json={"messages": MESSAGES, **options}).json["tokens"]
    http.post("/v1/chat/completions", json={"messages": MESSAGES, **options})
    assert fake_engine.submits[-1].token_ids == tokens


def test_a_text_longer_than_the_context_is_tokenised(http: FlaskClient, tokenizer: Tokenizer) -> None:
    text = "hello world " * 10_000
    ids = http.post("/tokenize", json={"prompt": text}).json["tokens"]
    assert ids == tokenizer.encode(text) and len(ids) > 4096
    assert http.post("/detokenize", json={"tokens": ids}).json["prompt"] == text


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "content"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"content": "a", "parse_special": False}, "parse_special"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": 3}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
def test_a_bad_field_is_named(http: FlaskClient, path: str, body: dict[str, Any], field: str) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, field)


def test_other_errors(make_app: Callable[..., Flask], fake_engine) -> None:
    http = make_app(max_body_bytes=1000).test_client()
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert http.post(path, json={**body, "model": "other"}).status_code == 404
        assert http.post(path, data="{").status_code == 415
        assert http.post(path, data="{", content_type="application/json").status_code == 400
        assert http.post(path, json={**body, "x": "y" * 1000}).status_code == 413
    assert http.post("/tokenize", json={"prompt": "\ud800"}).status_code == 400
    service = http.application.extensions["pagegraph"]
    assert not +service._threads_of  # every thread was given back


def test_tokenizer_info_renders_and_has_no_paths(http: FlaskClient, tokenizer: Tokenizer, tokenizer_folder) -> None:
    answer = http.get("/tokenizer_info")
    info = answer.json
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "<|end|>", None)
    assert info["added_tokens_decoder"]["0"]["content"] == "<s>" and info["model_max_length"] == 128
    rendered = (
        jinja2.Environment().from_string(info["chat_template"]).render(messages=MESSAGES, add_generation_prompt=True)
    )
    assert rendered == tokenizer.render_chat(MESSAGES)
    assert str(tokenizer_folder) not in answer.text


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions", "/v1/chat/completions"])
def test_half_of_a_surrogate_pair_is_refused_by_its_field(http: FlaskClient, path: str) -> None:
    chat = {"messages": [{"role": "user", "content": "a\ud800"}]}
    for body in (
        [chat] if "chat" in path else [{"prompt": "a\ud800"}, chat] if path == "/tokenize" else [{"prompt": "\udc00"}]
    ):
        answer = http.post(path, json={"model": "tiny", **body})
        (field,) = body
        assert (answer.status_code, answer.json["error"]["param"]) == (400, field), answer.json
        assert "surrogate" in answer.json["error"]["message"]
