"""One generation, from its checked request to the answer: take a thread, tokenise, submit, then stream or collect.

Every surface comes through here; they differ in how a body is read and in what an `Answer` makes of the pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flask import Response, g

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.text.output import Piece
from pagegraph.web import access
from pagegraph.web.errors import json_response
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.service import Service
from pagegraph.web.stream import ClientGone, Events, EventStream, Generation
from pagegraph.web.submit import Prompt, submit, tokenize

_STATUS_CLIENT_GONE = 499


class Answer(Events, Protocol):
    """What becomes of the pieces of a generation: events of a stream, or one value at the end."""

    def add(self, index: int, piece: Piece) -> None:
        """Take one piece of the sequence at `index` into the whole answer."""
        ...

    def whole(self) -> Any:
        """The answer that is not streamed, as JSON."""
        ...


Make = Callable[[list[list[int]], Generation], Answer]  # from the prompts' token ids and what runs


def generate(
    service: Service, info: EngineInfo, checked: GenerationRequest, prompts: Sequence[Prompt], make: Make
) -> Response:
    """The response to a checked request. Raises ApiError, BadParameter, ClientGone, RequestFailed or EngineDead."""
    generation, token_ids = start(service, info, checked, prompts)
    with contextlib.ExitStack() as on_error:
        on_error.callback(generation.close)
        answer = make(token_ids, generation)
        if checked.stream:
            response = _streamed(generation, answer, service.settings.keep_alive_s)
        else:
            response = json_response(collect(generation, answer))
        on_error.pop_all()
    return name_ignored(response, checked)


def start(
    service: Service, info: EngineInfo, checked: GenerationRequest, prompts: Sequence[Prompt]
) -> tuple[Generation, list[list[int]]]:
    """A generation that the engine has taken, to be closed by whoever gets it, and the token ids of its prompts.

    Raises what `generate` raises.
    """
    if checked.request_id is not None and not g.has_request_id:
        g.request_id = checked.request_id
    with contextlib.ExitStack() as on_error:
        release = service.admit(info, access.asker().name)
        on_error.callback(release)
        token_ids = tokenize(service, prompts, checked, info)
        generation = submit(service, checked, token_ids, info, release)
        on_error.pop_all()
        on_error.callback(generation.close)
        generation.wait_admitted()
        g.quotas = generation.group.quotas
        on_error.pop_all()
    return generation, token_ids


def name_ignored(response: Response, checked: GenerationRequest) -> Response:
    """The response with a header that names the request's fields without effect."""
    if checked.ignored:
        response.headers["x-ignored-fields"] = _header_text(checked.ignored)
    return response


def collect(generation: Generation, answer: Answer) -> Any:
    """The whole answer, once all tokens have come. Raises ClientGone, RequestFailed or EngineDead."""
    with contextlib.closing(generation):
        for pieces in generation.batches(keep_alive_s=float("inf")):
            for index, piece in pieces:
                answer.add(index, piece)
    return answer.whole()


def gone(error: ClientGone) -> Response:
    """What is put down for a client that left; nobody reads it."""
    return Response(status=_STATUS_CLIENT_GONE)


def _streamed(generation: Generation, answer: Answer, keep_alive_s: float) -> Response:
    """A response whose events are made while it is sent; closing it closes the generation."""
    response = Response(EventStream(generation, answer, keep_alive_s), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def _header_text(names: list[str]) -> str:
    """Field names as a header value: ASCII, no control characters, bounded."""
    return ", ".join("".join(char for char in name[:64] if "!" <= char <= "~") for name in names[:32])
