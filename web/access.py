"""API keys and origins: who may ask, and what keeps the askers of several keys apart.

With one key all who have it share what is computed, as without. With several, each key has its own prefix cache, so that
nobody can tell by how fast an answer comes what others asked, and its own stored responses. How much a key may ask goes
with its name to the engine, which counts.

Browsers let a page's script ask a server of another origin if that server says so (CORS, as the Fetch standard has it).
Knows no routes but those that are open.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from flask import Flask, Response, g, request

from pagegraph.runtime.askers import Asker
from pagegraph.runtime.server import health
from pagegraph.web import errors, pages
from pagegraph.web.errors import ApiError

_PREFLIGHT_S = 600  # that a browser need not ask again whether it may
# Headers of answers that scripts may read.
_EXPOSED = ", ".join(("x-request-id", "x-ignored-fields", "retry-after", *errors.QUOTA_HEADERS))


def require_key(app: Flask, askers: Mapping[str, Asker]) -> None:
    """Refuse every path without a key that is one of `askers`: `Authorization: Bearer KEY` or `x-api-key: KEY`; known route or not.

    But not health, and not the pages: browsers send no key for them, and they tell nothing until they are given one.
    """
    expected = [(_digest(key), one) for key, one in askers.items()]

    def check() -> None:
        if request.path in health.PATHS or request.path == "/docs" or pages.is_open(request.path):
            return
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        given = [request.headers.get("x-api-key", "")]  # Anthropic's clients send it so
        given += [bearer.strip()] if scheme.lower() == "bearer" else []
        # All are compared, whichever fits: the time tells nothing.
        found = [who for one in map(_digest, given) for key, who in expected if hmac.compare_digest(one, key)]
        if not found:
            raise ApiError(
                401,
                "missing or wrong API key; send Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
            )
        g.asker = found[-1]

    app.before_request(check)


def allow_origins(app: Flask, origins: str) -> None:
    """Tell browsers that scripts of pages of these origins, with spaces between, may ask; `*` is any origin.

    A browser's question whether it may ask comes without a key, and is answered without one.
    """
    allowed = frozenset(origins.split())

    def may() -> bool:
        return "*" in allowed or request.headers.get("Origin") in allowed

    def answer_preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers or not may():
            return None
        headers = {
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
            "Access-Control-Max-Age": str(_PREFLIGHT_S),
        }
        return Response(status=204, headers=headers)

    def tell(response: Response) -> Response:
        if "*" not in allowed:
            response.vary.add("Origin")
        if "Origin" in request.headers and may():
            response.headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        return response

    app.before_request(answer_preflight)
    app.after_request(tell)


def admit_all(app: Flask, asker: Asker) -> None:
    """Ask for no key: whoever comes is `asker`."""

    def check() -> None:
        g.asker = asker

    app.before_request(check)


def asker() -> Asker:
    """Who has the key of the current request."""
    return g.asker


def _digest(key: str) -> bytes:
    """Keys are compared by digest: equal lengths, so that the comparison takes constant time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
