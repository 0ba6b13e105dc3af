"""The routes of /v1/messages: an answer, and how many tokens its prompt has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response, g

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.web.anthropic.answer import MessagesAnswer
from pagegraph.web.anthropic.errors import response_of
from pagegraph.web.anthropic.request import NAMES, parse_messages
from pagegraph.web.as_chat import rename_ignored, renaming
from pagegraph.web.errors import as_api_error, json_response
from pagegraph.web.generate import generate, gone
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.service import Service, current_service
from pagegraph.web.stream import ClientGone, Generation
from pagegraph.web.submit import Prompt, prompts_of, read_body, tokenize

blueprint = Blueprint("anthropic", __name__)
blueprint.register_error_handler(ClientGone, gone)


@blueprint.errorhandler(Exception)
def _answer_error(error: Exception) -> Response:
    return response_of(as_api_error(error))


@blueprint.after_request
def _add_header(response: Response) -> Response:
    response.headers["request-id"] = g.request_id
    return response


@blueprint.post("/v1/messages")
def create() -> Response:
    """The assistant's next message."""
    service = current_service()
    info = service.engine.info()
    checked, prompts = _read(service, info)

    def make(token_ids: list[list[int]], generation: Generation) -> MessagesAnswer:
        return MessagesAnswer(checked, service, token_ids[0], generation.outputs[0])

    with renaming(NAMES):
        return generate(service, info, checked, prompts, make)


@blueprint.post("/v1/messages/count_tokens")
def count_tokens() -> Response:
    """How many tokens the prompt of a request has."""
    service = current_service()
    info = service.engine.info()
    checked, prompts = _read(service, info, counts=True)
    with renaming(NAMES):
        (ids,) = tokenize(service, prompts, checked, info)
    return json_response({"input_tokens": len(ids)})


def _read(service: Service, info: EngineInfo, counts: bool = False) -> tuple[GenerationRequest, Sequence[Prompt]]:
    """The current request, checked, and its prompt."""

    def check(body: dict[str, Any]) -> tuple[GenerationRequest, Sequence[Prompt]]:
        checked = parse_messages(body, info, counts)
        service.check_model(checked.model)
        with renaming(NAMES):
            prompts = prompts_of(service, checked, info)
        rename_ignored(checked, NAMES)
        return checked, prompts

    return read_body(service, check)
