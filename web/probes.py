"""Health, version and the engine's metrics.

Knows whether the engine answers. Health needs no key and shows no internals.
"""

from __future__ import annotations

import http.client
import urllib.request
from importlib import metadata

from flask import Blueprint, Response

from runtime.client import EngineDead
from web.errors import ApiError, json_response
from web.openai import service

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
# A probe asks often and gives up soon: it does not wait for an engine that is still to answer first.
_PROBE_WAIT_S = 1.0
_METRICS_TIMEOUT_S = 2.0

blueprint = Blueprint("probes", __name__)


@blueprint.get("/health/live")
def live() -> Response:
    """200 as long as this worker answers at all."""
    return json_response({"status": "live"})


@blueprint.get("/health")
@blueprint.get("/health/ready")
def ready() -> Response:
    """200 when the engine answers and takes requests, else 503 with the reason."""
    try:
        info = service().engine.info(_PROBE_WAIT_S)
    except EngineDead:
        return _not_ready("no engine")
    return _not_ready("draining") if info.draining else json_response({"status": "ready"})


@blueprint.get("/version")
def version() -> Response:
    """The version of the installed distribution."""
    return json_response({"version": metadata.version("pagegraph")})


@blueprint.get("/metrics")
def metrics() -> Response:
    """The engine's Prometheus text, fetched from the probe port."""
    address = service().settings.probe_address
    if address is None:
        raise ApiError(404, "metrics are not served here")
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_METRICS_TIMEOUT_S) as answer:
            return Response(answer.read(), content_type=answer.headers.get("Content-Type", "text/plain"))
    except (OSError, http.client.HTTPException):
        raise ApiError(503, "the engine's metrics cannot be read") from None


def _not_ready(status: str) -> Response:
    response = json_response({"status": status}, 503)
    response.headers["Retry-After"] = "1"
    return response
