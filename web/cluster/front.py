"""The front: an ASGI application that hands each request to a replica and passes the answer on as it comes.

Asks another replica where one has no room, has ended before it answered, or does not have a stored response. Knows HTTP and Ray's
handles; knows no model.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

import msgspec
from ray import serve
from ray.exceptions import RayActorError

from pagegraph.web.cluster.messages import Head, Headers, Request, ServerGone, end_to_end
from pagegraph.web.cluster.placement import Prompts
from pagegraph.web.errors import ApiError, body_too_large
from pagegraph.web.settings import WebSettings

log = logging.getLogger("pagegraph.front")

MAX_BODY_BYTES = WebSettings.max_body_bytes
FRONT = secrets.token_hex(8)  # of this process, whose router chooses for it
STORED = "/v1/responses/"  # paths of what one server alone has
LOST = (RayActorError, ServerGone)
MOST_LOST = 2  # replicas that may end with a request before it is taken for the reason
EVENTS = b"text/event-stream"
KEY_HEADERS = (b"authorization", b"x-api-key")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Broken(Exception):
    """An answer that had begun cannot be ended: its connection breaks."""


class Front:
    """The application. Its replicas are those of the handle `replicas` of the deployment that it runs in."""

    def __init__(self) -> None:
        self._prompts = Prompts()
        self._handle: Any = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for name in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{name}.complete"})
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            raise ValueError(f"{scope['type']} is not served; use HTTP")

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            await _refuse(send, body_too_large(MAX_BODY_BYTES))
            return
        headers: Headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        key = b" ".join(value for name, value in headers if name.lower() in KEY_HEADERS)
        request = Request(
            scope["method"],
            _target(scope),
            end_to_end(headers),
            body,
            FRONT,
            self._prompts.route(body, key.decode("latin-1")),
        )
        try:
            await self._answer(request, send)
        finally:
            request.ended = True

    async def _answer(self, request: Request, send: Send) -> None:
        lost = 0
        while True:
            answer = self._replicas().forward.remote(request)
            try:
                head = await anext(answer)
                kept = await _kept(request, head, answer)
            except LOST as error:
                lost += 1
                log.warning("a replica ended before it answered: %s", error)
                if lost == MOST_LOST:
                    await _refuse(send, ApiError(500, "the servers ended that computed this request", is_final=True))
                    return
                continue
            if kept is not None:
                break
            request.tried.add(head.replica)
            answer.cancel()
        await send({"type": "http.response.start", "status": head.status, "headers": head.headers})
        try:
            for piece in kept:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            async for piece in answer:
                request.begun = True
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except LOST as error:
            log.warning("a replica ended while it answered: %s", error)
            if any(name.lower() == b"content-type" and value.startswith(EVENTS) for name, value in head.headers):
                with contextlib.suppress(Exception):
                    await send({"type": "http.response.body", "body": _event(), "more_body": True})
            raise Broken("the replica of this answer has ended") from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _replicas(self) -> Any:
        if self._handle is None:
            deployment: Any = serve.get_replica_context().servable_object
            self._handle = deployment.replicas.options(stream=True)
        return self._handle


async def _kept(request: Request, head: Head, answer: AsyncIterator[bytes]) -> list[bytes] | None:
    """None if another replica is to be asked, else what is read of the body.

    A replica that was asked already is asked again where there is no other: its answer stands.
    """
    if head.replica in request.tried:
        return []
    if head.status == 503 or (head.status == 404 and request.target.startswith(STORED)):
        return None
    if head.status == 400 and b"previous_response_id" in request.body:
        pieces = [piece async for piece in answer]
        return None if b"previous_response_not_found" in b"".join(pieces) else pieces
    return []


async def _body(receive: Receive) -> bytes | None:
    """Of a request; None: it is larger than a server takes."""
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Broken("the client left before it had sent its request")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return b"".join(pieces)


def _target(scope: Message) -> str:
    path = (scope.get("raw_path") or quote(scope["path"]).encode()).decode("latin-1")
    path = path.removeprefix(scope.get("root_path") or "") or "/"
    query = scope.get("query_string") or b""
    return f"{path}?{query.decode('latin-1')}" if query else path


async def _refuse(send: Send, error: ApiError) -> None:
    content = msgspec.json.encode(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if error.is_final:
        headers.append((b"x-should-retry", b"false"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})


def _event() -> bytes:
    """The error as an event that clients of every API here take for one; what an event before it had begun ends with a line."""
    body = ApiError(503, "the server of this answer has ended", code="engine_dead").body()
    return b"\n\nevent: error\ndata: " + msgspec.json.encode({"type": "error", **body}) + b"\n\n"
