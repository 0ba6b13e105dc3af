"""Errors in Anthropic's shape. Knows statuses and words, no routes."""

from __future__ import annotations

from typing import Any

from flask import Response, g

from pagegraph.web.errors import ApiError, json_response

THREAD_UNSUPPORTED = "thread_unsupported_request"  # Anthropic's code where a conversation cannot be kept by the server
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def body_of(error: ApiError, request_id: str) -> dict[str, Any]:
    """The error as JSON."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    described: dict[str, Any] = {"type": kind, "message": error.message}
    if error.code == THREAD_UNSUPPORTED:
        described["details"] = {"error_code": error.code, "unsupported": []}
    return {"type": "error", "error": described, "request_id": request_id}


def response_of(error: ApiError) -> Response:
    """The error as a response, with the headers that it has everywhere."""
    answer = json_response(body_of(error, g.request_id), error.status)
    for name, value in error.response().headers.items():
        if name not in ("Content-Type", "Content-Length"):
            answer.headers[name] = value
    return answer
