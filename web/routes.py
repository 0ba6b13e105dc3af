"""The OpenAI routes: models, completions and chat completions.

Knows the order: check, take a thread, tokenise, submit, answer. Fields are checked in `schema`, prompts become
sequences in `submit`, sequences JSON in `responses` and events in `stream`, errors answers in `errors`.
"""

from __future__ import annotations

import contextlib

from flask import Blueprint, Response, g

from pagegraph.web.errors import json_response
from pagegraph.web.responses import ChatResponse, CompletionResponse, GenerationResponse, header_text, model_card
from pagegraph.web.schema import parse_chat, parse_completion
from pagegraph.web.service import current_service
from pagegraph.web.stream import EventStream, Generation
from pagegraph.web.submit import Parse, read_request, submit, tokenize

blueprint = Blueprint("openai", __name__)


@blueprint.get("/v1/models")
def list_models() -> Response:
    """The one model, as a list."""
    return json_response({"object": "list", "data": [model_card(current_service())]})


@blueprint.get("/v1/models/<path:name>")
def retrieve_model(name: str) -> Response:
    """One model by name."""
    current_service().check_model(name)
    return json_response(model_card(current_service()))


@blueprint.post("/v1/completions")
def completions() -> Response:
    """Text from prompts."""
    return _generate(parse_completion, CompletionResponse)


@blueprint.post("/v1/chat/completions")
def chat_completions() -> Response:
    """The assistant's next message."""
    return _generate(parse_chat, ChatResponse)


def _generate(parse: Parse, response_type: type[GenerationResponse]) -> Response:
    service = current_service()
    info = service.engine.info()
    with contextlib.ExitStack() as on_error:
        checked, prompts = read_request(parse, service, info)
        g.request_id = g.request_id or checked.request_id
        release = service.admit(info)
        on_error.callback(release)
        token_ids = tokenize(service, prompts, checked, info)
        generation = submit(service, checked, token_ids, info, release)
        on_error.pop_all()
        on_error.callback(generation.close)
        generation.wait_admitted()
        body = response_type(checked, service, info, token_ids, generation)
        answer = (
            _streamed(generation, body, service.settings.keep_alive_s) if checked.stream else _whole(generation, body)
        )
        on_error.pop_all()
    if checked.ignored:
        answer.headers["x-ignored-fields"] = header_text(checked.ignored)
    return answer


def _streamed(generation: Generation, body: GenerationResponse, keep_alive_s: float) -> Response:
    """An answer whose events are made while it is sent; closing it closes the generation."""
    answer = Response(EventStream(generation, body, keep_alive_s), mimetype="text/event-stream")
    answer.headers["Cache-Control"] = "no-cache"
    answer.headers["X-Accel-Buffering"] = "no"
    return answer


def _whole(generation: Generation, body: GenerationResponse) -> Response:
    """Wait for all tokens, then answer at once. Raises ClientGone, RequestFailed or EngineDead."""
    with contextlib.closing(generation):
        for pieces in generation.batches(keep_alive_s=float("inf")):
            for index, piece in pieces:
                body.add(index, piece)
    return json_response(body.whole())
