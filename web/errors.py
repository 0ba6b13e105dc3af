"""Errors in OpenAI's shape, for every path and status.

Knows HTTP and JSON. Bodies hold only text written for the user: no paths, tracebacks or process facts.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from pagegraph.runtime.ipc.client import EngineDead, RequestFailed
from pagegraph.runtime.ipc.protocol import Quota, Quotas
from pagegraph.runtime.sampling_params import BadParameter
from pagegraph.runtime.server.health import retry_after

_log = logging.getLogger(__name__)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_CODES = {429: "rate_limit_exceeded"}
# As OpenAI names them: of each kind the limit, what is left of it, and when all of it is.
_QUOTA_KINDS = ("requests", "tokens")  # fields of Quotas
_QUOTA_PARTS = ("limit", "remaining", "reset")
QUOTA_HEADERS = tuple(f"x-ratelimit-{what}-{kind}" for kind in _QUOTA_KINDS for what in _QUOTA_PARTS)
_ENGINE_DOWN = "the engine is not running; try again shortly"


class ApiError(Exception):
    """An error to answer with: HTTP status, a message for the user, the field at fault and a code.

    `retry_after_s`: when to come back, of 429 and 503. `is_final`: clients are told not to try again by themselves.
    `quotas`: what is left of the limits of the key that asked.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 1.0,
        is_final: bool = False,
        quotas: Quotas | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.encode("utf-8", "replace").decode()  # users can send halves of surrogate pairs
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.is_final = is_final
        self.quotas = quotas

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's JSON object."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, fallback)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as a response; 429 and 503 say when to come back."""
        answer = json_response(self.body(), self.status)
        if self.status in (429, 503):
            answer.headers["Retry-After"] = retry_after(self.retry_after_s)
        if self.is_final:
            answer.headers["x-should-retry"] = "false"  # heeded by OpenAI's and Anthropic's clients
        if self.quotas is not None:
            answer.headers.extend(quota_headers(self.quotas))
        if self.status == 401:
            answer.headers["WWW-Authenticate"] = "Bearer"
        return answer


def json_response(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(value), status, mimetype="application/json")


def quota_headers(quotas: Quotas) -> dict[str, str]:
    """Headers that say what is left of a key's limits, by name; none of a limit that there is not."""
    headers: dict[str, str] = {}
    for kind in _QUOTA_KINDS:
        quota: Quota | None = getattr(quotas, kind)
        if quota is not None:
            values = (quota.limit, quota.remaining, _duration(quota.reset_s))
            headers |= {f"x-ratelimit-{what}-{kind}": str(value) for what, value in zip(_QUOTA_PARTS, values)}
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes one: 250ms, 3.5s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    minutes, rest = divmod(math.ceil(1000 * seconds) / 1000, 60)
    return (f"{minutes:g}m" if minutes else "") + f"{rest:.3f}".rstrip("0").rstrip(".") + "s"


def as_api_error(error: Exception) -> ApiError:
    """What the user is told of any error; an unforeseen one is logged and becomes a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadParameter):
        return ApiError(400, str(error), param=error.field, code=error.code)
    if isinstance(error, RequestFailed):
        code = "invalid_value" if error.status == 400 and error.field else _CODES.get(error.status)
        return ApiError(
            error.status,
            error.message,
            param=error.field or None,
            code=code,
            retry_after_s=error.retry_after_s,
            is_final=error.status == 500,  # a step failed for it, or an engine: it would fail another
            quotas=error.quotas,
        )
    if isinstance(error, EngineDead):
        return ApiError(503, _ENGINE_DOWN, code="engine_dead", retry_after_s=error.retry_after_s or 1.0)
    if isinstance(error, HTTPException):
        return _of_http(error)
    _log.error("unforeseen error", exc_info=error)
    return ApiError(500, "internal error")


def _of_http(error: HTTPException) -> ApiError:
    status = error.code or 500
    if status == 404:
        return ApiError(404, f"no such route: {request.method} {request.path[:200]}")
    if isinstance(error, MethodNotAllowed):
        return ApiError(
            405, f"{request.method} is not allowed here; use {', '.join(sorted(error.valid_methods or ()))}"
        )
    if status == 413:
        return body_too_large(current_app.config["MAX_CONTENT_LENGTH"])
    return ApiError(status, error.name.lower())


def body_too_large(limit: int) -> ApiError:
    """413, told as soon as the size is known."""
    return ApiError(413, f"the request body is larger than max_body_bytes = {limit}")


def register(app: Flask) -> None:
    """Answer every error of `app` in OpenAI's shape."""

    def answer(error: Exception) -> Response:
        described = as_api_error(error)
        response = described.response()
        if isinstance(error, MethodNotAllowed):
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
        return response

    app.register_error_handler(Exception, answer)
