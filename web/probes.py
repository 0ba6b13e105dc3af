"""Health, version and the engine's metrics.

What health means is `runtime.server.health`'s to say, here as on the probe port. It needs no key and shows no internals.
"""

from __future__ import annotations

import http.client
import urllib.request
from importlib import metadata

from flask import Blueprint, Response

from pagegraph.runtime.server.health import Health, engine_health
from pagegraph.web.errors import ApiError, json_response
from pagegraph.web.service import current_service

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
# A probe asks often and gives up soon: it does not wait for an engine that is still to answer first.
_PROBE_WAIT_S = 1.0
_METRICS_TIMEOUT_S = 2.0

blueprint = Blueprint("probes", __name__)


@blueprint.get("/health/live")
def live() -> Response:
    """503 when only a restart helps."""
    found = _health()
    return _answer(found, found.live)


@blueprint.get("/health")
@blueprint.get("/health/ready")
def ready() -> Response:
    """200 when requests are taken now."""
    found = _health()
    return _answer(found, found.ready)


@blueprint.get("/version")
def version() -> Response:
    """The version of the installed distribution."""
    return json_response({"version": metadata.version("pagegraph")})


@blueprint.get("/metrics")
def metrics() -> Response:
    """The engine's Prometheus text, fetched from the probe port."""
    address = current_service().settings.probe_address
    if address is None:
        raise ApiError(404, "metrics are not served here")
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_METRICS_TIMEOUT_S) as answer:
            return Response(answer.read(), content_type=answer.headers.get("Content-Type", "text/plain"))
    except (OSError, http.client.HTTPException):
        raise ApiError(503, "the engine's metrics cannot be read") from None


def _health() -> Health:
    service = current_service()
    return engine_health(service.engine, service.settings.silence_s, _PROBE_WAIT_S)


def _answer(found: Health, good: bool) -> Response:
    response = json_response({"status": found.status}, 200 if good else 503)
    if not good:
        response.headers["Retry-After"] = "1"
    return response
