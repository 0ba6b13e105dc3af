"""Text to token ids and back for clients, and what the tokenizer is: /tokenize, /detokenize, /tokenizer_info.

The shapes are vLLM's; `content` in place of `prompt` is llama.cpp's. A chat is rendered as /v1/chat/completions does it.
Knows the fields and shapes of these three; runs no model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.sampling_params import check_ids
from pagegraph.runtime.text.tokenizer import SPECIAL_NAMES
from pagegraph.web import access
from pagegraph.web.errors import json_response
from pagegraph.web.fields import Fields, refuse
from pagegraph.web.schema import GenerationRequest, parse_chat
from pagegraph.web.service import Service, current_service
from pagegraph.web.submit import encode, no_unicode, prompt_text, read_body, truncated, turn

_OWN = ("return_token_strs",)  # fields beside those of a chat

blueprint = Blueprint("tokenization", __name__)


@dataclass(frozen=True)
class TokenizeRequest:
    """One checked request: a text, or a chat to be rendered."""

    text: str | None
    chat: GenerationRequest | None
    add_special_tokens: bool
    token_strs: bool


def parse_tokenize(body: dict[str, Any], info: EngineInfo) -> TokenizeRequest:
    """A body of POST /tokenize: with messages it is one of /v1/chat/completions too."""
    fields = Fields(body)
    token_strs = fields.boolean("return_token_strs", False)
    if body.get("messages") is not None:
        rest = {name: value for name, value in body.items() if name not in _OWN}
        chat = parse_chat(rest, info.vocab_size, info.sampling_defaults)
        return TokenizeRequest(None, chat, chat.add_special_tokens, token_strs)
    fields.text("model")
    prompt, content = fields.text("prompt"), fields.text("content")
    if prompt is not None and content is not None:
        refuse("content", "is llama.cpp's name of prompt; give one of them")
    if prompt is None and content is None:
        refuse("prompt", 'is missing; give prompt, a string, or messages, for example "Hello"')
    if fields.boolean("with_pieces", False):
        refuse("with_pieces", "is not served; give return_token_strs")
    if not fields.boolean("parse_special", True):
        refuse("parse_special", "false is not served; leave it out")
    add = fields.boolean("add_special_tokens", fields.boolean("add_special", content is None))
    fields.check_rest()
    return TokenizeRequest(content if prompt is None else prompt, None, add, token_strs)


@blueprint.post("/tokenize")
def tokenize() -> Response:
    """Token ids of a text or of a chat, however long."""
    with _thread() as (service, info):
        asked = read_body(service, lambda body: _checked(body, service, info))
        try:
            text = prompt_text(service.chat, asked.chat) if asked.chat else asked.text or ""
            ids = encode(service, text, asked.add_special_tokens)
            if asked.chat:
                ids = truncated(ids, asked.chat, info)
        except UnicodeEncodeError:
            raise no_unicode("messages" if asked.chat else "prompt") from None
        strings = service.tokenizer.vocabulary_entries(ids) if asked.token_strs else None
    return json_response({"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": strings})


@blueprint.post("/detokenize")
def detokenize() -> Response:
    """The text of token ids, special tokens included."""
    with _thread() as (service, info):

        def check(body: dict[str, Any]) -> list[int]:
            fields = Fields(body)
            service.check_model(fields.text("model"))
            ids = fields.take("tokens")
            check_ids("tokens", ids, info.vocab_size)
            fields.check_rest()
            return ids

        ids = read_body(service, check)
        with turn(service, len(ids)):
            text = service.tokenizer.decode(ids, skip_special=False)
    return json_response({"prompt": text})


@blueprint.get("/tokenizer_info")
def tokenizer_info() -> Response:
    """What tokenizer_config.json says that a client needs to render and tokenise as the server does."""
    service = current_service()
    tokenizer = service.tokenizer
    special = {name: tokenizer.special_tokens.get(name) for name in SPECIAL_NAMES}
    facts = {
        "tokenizer_class": tokenizer.class_name,
        **special,
        "chat_template": tokenizer.chat_template,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.engine.info().max_model_len,
        "added_tokens_decoder": tokenizer.added_tokens,
    }
    return json_response(facts)


def _checked(body: dict[str, Any], service: Service, info: EngineInfo) -> TokenizeRequest:
    asked = parse_tokenize(body, info)
    service.check_model(asked.chat.model if asked.chat else body.get("model"))
    return asked


@contextlib.contextmanager
def _thread() -> Iterator[tuple[Service, EngineInfo]]:
    """One of the threads that requests with long texts may hold, and the engine's facts."""
    service = current_service()
    info = service.engine.info()
    release = service.admit(info, access.asker().name)
    try:
        yield service, info
    finally:
        release()
