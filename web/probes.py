"""Health, version, load and the engine's metrics on the API's port. Health needs no key and shows no internals.

What health means, and what its probes are told, is `runtime.server.health`'s to say, here as on the probe port.
"""

from __future__ import annotations

import contextlib
import http.client
from dataclasses import replace
from importlib import metadata

from flask import Blueprint, Response, request

from pagegraph.runtime.ipc.connection import EngineDead
from pagegraph.runtime.server import comeback, health, pulse
from pagegraph.runtime.server.probes import METRICS_TIMEOUT_S, fetch
from pagegraph.web.errors import ApiError, json_response
from pagegraph.web.service import Service, current_service

# A probe asks often and gives up soon: it does not wait for an engine that is still to answer first.
_PROBE_WAIT_S = 1.0
_METRICS_TIMEOUT_S = METRICS_TIMEOUT_S + 1.0  # the probe port answers without an engine that hangs

blueprint = Blueprint("probes", __name__)


@blueprint.get("/health")
@blueprint.get("/health/live")
@blueprint.get("/health/ready")
@blueprint.route("/ping", methods=["GET", "POST"])
def answer_probe() -> Response:
    """503 of /health/live: only a restart helps. 200 of the others: requests are taken now."""
    service = current_service()
    with contextlib.suppress(EngineDead):
        service.engine.info(_PROBE_WAIT_S)
    found = health.of_all([_health(service, rank) for rank in range(len(service.engine.clients))])
    status, body, headers = found.answer(request.path)
    return Response(body, status, headers)


def _health(service: Service, rank: int) -> health.Health:
    settings, file = service.settings, service.settings.pulse(rank)
    due = None if file is None else pulse.read(file)
    found = health.engine_health(service.engine.clients[rank], settings.silence_s, due)
    follows = comeback.seconds(settings.comeback(rank)) is not None
    return replace(found, live=found.live or follows)


@blueprint.get("/version")
def version() -> Response:
    """The version of the installed distribution."""
    return json_response({"version": metadata.version("pagegraph")})


@blueprint.get("/load")
def load() -> Response:
    """How many sequences run and wait, of all web processes."""
    info = current_service().engine.info()
    return json_response({"server_load": info.num_running + info.num_waiting})


@blueprint.get("/metrics")
def metrics() -> Response:
    """The engine's Prometheus text, fetched from the probe port."""
    address = current_service().settings.probe_address
    if address is None:
        raise ApiError(404, "metrics are not served here")
    try:
        with fetch(f"http://{address}/metrics", timeout=_METRICS_TIMEOUT_S) as answer:
            return Response(answer.read(), content_type=answer.headers.get("Content-Type", "text/plain"))
    except (OSError, http.client.HTTPException):
        raise ApiError(503, "the engine's metrics cannot be read") from None
