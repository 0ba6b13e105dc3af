"""The OpenAI routes: models, completions and chat completions.

Fields are checked in `schema`, sequences become JSON in `responses`; what lies between is `generate`.
"""

from __future__ import annotations

from flask import Blueprint, Response

from pagegraph.web.errors import json_response
from pagegraph.web.generate import generate
from pagegraph.web.responses import ChatResponse, GenerationResponse, model_card
from pagegraph.web.schema import parse_chat, parse_completion
from pagegraph.web.service import current_service
from pagegraph.web.stream import Generation
from pagegraph.web.submit import Parse, read_request
from pagegraph.web.text_completion import CompletionResponse

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
    checked, prompts = read_request(parse, service, info)

    def make(token_ids: list[list[int]], generation: Generation) -> GenerationResponse:
        return response_type(checked, service, info, token_ids, generation)

    return generate(service, info, checked, prompts, make)
