"""The routes of /v1/responses: create, retrieve, delete, cancel, list the input, count its tokens.

A response in the background is made by a thread of the process that took it, and found by all in the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, request

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.sampling_params import Range, shown
from pagegraph.web import access
from pagegraph.web.as_chat import rename_ignored, renaming
from pagegraph.web.errors import ApiError, as_api_error, json_response
from pagegraph.web.fields import refuse
from pagegraph.web.generate import collect, generate, name_ignored, start
from pagegraph.web.openai_responses.answer import ResponsesAnswer
from pagegraph.web.openai_responses.request import NAMES, ResponsesRequest, parse_responses
from pagegraph.web.openai_responses.store import ResponseStore, Stored
from pagegraph.web.openai_responses.truncation import shortened
from pagegraph.web.service import Service, current_service
from pagegraph.web.stream import ClientGone, Generation
from pagegraph.web.submit import Prompt, prompts_of, read_body, tokenize

_log = logging.getLogger(__name__)
_UNDER_WAY = ("queued", "in_progress")
_LIMIT = Range(1, 100, 20, int)

blueprint = Blueprint("openai_responses", __name__)


@blueprint.post("/v1/responses")
def create() -> Response:
    """The model's response to items."""
    service = current_service()
    info = service.engine.info()
    asked, prompts = _read(service, info)
    if asked.background:
        return _in_background(service, info, asked, prompts)

    with renaming(NAMES):
        return generate(service, info, asked.chat, prompts, lambda ids, running: _answer(service, asked, ids, running))


@blueprint.get("/v1/responses/<id>")
def retrieve(id: str) -> Response:
    """A stored response."""
    if request.args.get("stream", "false").lower() not in ("false", "0"):
        refuse("stream", "of a stored response is not served; leave it out")
    return json_response(_stored(id).response)


@blueprint.delete("/v1/responses/<id>")
def delete(id: str) -> Response:
    """Forget a stored response; one that is being made is ended."""
    if not _responses().delete(id):
        raise _unknown(id)
    return json_response({"id": id, "object": "response", "deleted": True})


@blueprint.post("/v1/responses/<id>/cancel")
def cancel(id: str) -> Response:
    """End a response that is made in the background; one that was cancelled stays so."""
    stored = _stored(id)
    if stored.response["status"] in _UNDER_WAY:
        stored = Stored(stored.response | {"status": "cancelled"}, stored.input, stored.before)
        _responses().close_with(stored)
    elif stored.response["status"] != "cancelled":
        status = stored.response["status"]
        raise ApiError(400, f"the response is {status}; only one that is made in the background can be cancelled")
    return json_response(stored.response)


@blueprint.get("/v1/responses/<id>/input_items")
def list_input(id: str) -> Response:
    """The items of a stored response's own input, the last first unless `order` is asc."""
    items = _stored(id).input
    order, after, limit = request.args.get("order", "desc"), request.args.get("after"), request.args.get("limit", "20")
    if order not in ("asc", "desc"):
        refuse("order", f"must be asc or desc; got {shown(order)}")
    size = int(_LIMIT.checked("limit", int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 9 else limit))
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            refuse("after", f"names no item of this input: {shown(after)}")
        items = items[places[0] + 1 :]
    page = items[:size]
    ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return json_response({"object": "list", "data": page, **ends, "has_more": len(items) > size})


@blueprint.post("/v1/responses/input_tokens")
def count_input() -> Response:
    """How many tokens the prompt of a request has."""
    service = current_service()
    info = service.engine.info()
    asked, prompts = _read(service, info)
    with renaming(NAMES):
        (ids,) = tokenize(service, prompts, asked.chat, info)
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})


def _read(service: Service, info: EngineInfo) -> tuple[ResponsesRequest, Sequence[Prompt]]:
    """The current request, checked, and its prompt."""

    def check(body: dict[str, Any]) -> tuple[ResponsesRequest, Sequence[Prompt]]:
        asked = parse_responses(body, info, _responses())
        service.check_model(asked.chat.model)
        return asked, [] if asked.is_shortened else _prompts(service, info, asked)

    asked, prompts = read_body(service, check)
    if asked.is_shortened:  # takes turns of its own for what is long
        with renaming(NAMES):
            asked = replace(asked, chat=shortened(service, info, asked.chat))
        prompts = _prompts(service, info, asked)
    return asked, prompts


def _prompts(service: Service, info: EngineInfo, asked: ResponsesRequest) -> Sequence[Prompt]:
    with renaming(NAMES):
        prompts = prompts_of(service, asked.chat, info)
    rename_ignored(asked.chat, NAMES)
    return prompts


def _answer(
    service: Service, asked: ResponsesRequest, token_ids: list[list[int]], generation: Generation
) -> ResponsesAnswer:
    responses = _responses()

    def keep(response: dict[str, Any]) -> None:
        if asked.store and not responses.put(Stored(response, asked.input, asked.before)):
            response["store"] = False

    return ResponsesAnswer(asked, service, token_ids[0], generation.outputs[0], keep)


def _in_background(service: Service, info: EngineInfo, asked: ResponsesRequest, prompts: Sequence[Prompt]) -> Response:
    """Answer at once with a response that is under way; a thread goes on with it."""
    with renaming(NAMES):
        generation, token_ids = start(service, info, asked.chat, prompts)
    try:
        answer = _answer(service, asked, token_ids, generation)
        begun = answer.response("in_progress")
        responses = _responses()
        responses.put(Stored(begun, asked.input, asked.before))
        generation.client_gone = lambda: responses.is_closed(begun["id"])  # the client may leave
        threading.Thread(target=_finish, args=(generation, answer), name="background response", daemon=True).start()
    except BaseException:
        generation.close()
        raise
    return name_ignored(json_response(begun), asked.chat)


def _finish(generation: Generation, answer: ResponsesAnswer) -> None:
    try:
        collect(generation, answer)
    except ClientGone:
        _log.debug("a response was cancelled")
    except Exception as error:
        answer.fail(as_api_error(error))


def _responses() -> ResponseStore:
    """The stored responses that whoever asks may see."""
    return current_service().responses.of(access.asker().name)


def _stored(id: str) -> Stored:
    stored = _responses().get(id)
    if stored is None:
        raise _unknown(id)
    if stored.response["status"] in _UNDER_WAY and not stored.owner_lives:
        error = {"code": "server_error", "message": "the process that made this response has ended"}
        return Stored(stored.response | {"status": "failed", "error": error}, stored.input, stored.before)
    return stored


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"no response {shown(id)} is stored", param="response_id")
