"""The Flask application: settings to routes, and request ids.

Run by gunicorn as `web.app:create_app("settings.json")`. Imports no torch.
"""

from __future__ import annotations

import uuid
from functools import partial
from pathlib import Path
from typing import Any

from flask import Flask, Response, g, request

from pagegraph.runtime.askers import Asker, askers
from pagegraph.runtime.ipc.replicas import Address, Replicas
from pagegraph.runtime.server import comeback
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.web import (
    access,
    embeddings,
    errors,
    pages,
    probes,
    recent,
    request_log,
    request_metrics,
    routes,
    tokenization,
)
from pagegraph.web.anthropic import routes as anthropic
from pagegraph.web.generate import gone
from pagegraph.web.openai_responses import routes as openai_responses
from pagegraph.web.openapi import document
from pagegraph.web.schema import is_request_id
from pagegraph.web.service import Service
from pagegraph.web.settings import WebSettings
from pagegraph.web.stream import ClientGone
from pagegraph.web.tracing import Tracing, connect


def create_app(config: str | Path | dict[str, Any] | WebSettings) -> Flask:
    """An app from a settings file, a mapping or settings.

    Raises ValueError for bad settings and FileNotFoundError without tokenizer files.
    """
    settings = WebSettings.load(config)
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.url_map.merge_slashes = False  # `//v1/models` is no route, not a redirect to one
    tracing = None
    if settings.otlp_traces_endpoint is not None:
        provider = connect(settings.otlp_traces_endpoint, settings.served_model_name)
        tracing = Tracing(provider, settings.served_model_name)
    engine = Replicas(
        [
            Address(address, partial(comeback.seconds, file), partial(comeback.is_started, file))
            for rank, address in enumerate(settings.engine_addresses)
            for file in [settings.comeback(rank)]
        ],
        silence_s=settings.silence_s,
        block_hash_key=None if settings.block_hash_key is None else bytes.fromhex(settings.block_hash_key),
        on_timeline=tracing.add if tracing is not None else lambda _: None,
    )
    app.extensions["pagegraph"] = Service(settings, Tokenizer.load(settings.model), engine, tracing)
    errors.register(app)
    app.register_error_handler(ClientGone, gone)
    app.before_request(_name_request)
    request_metrics.count_requests(app)
    if tracing is not None:
        tracing.follow(app)
    if settings.log_requests:
        request_log.log_requests(app)
    if settings.allowed_origins is not None:
        access.allow_origins(app, settings.allowed_origins)
    if settings.api_key is None:
        access.admit_all(app, Asker("", **settings.limits))
    else:
        access.require_key(app, askers(settings.api_key, settings.limits))
    app.after_request(_add_headers)
    app.register_blueprint(routes.blueprint)
    app.register_blueprint(openai_responses.blueprint)
    app.register_blueprint(anthropic.blueprint)
    app.register_blueprint(tokenization.blueprint)
    app.register_blueprint(embeddings.blueprint)
    app.register_blueprint(probes.blueprint)
    app.register_blueprint(recent.blueprint)
    app.register_blueprint(document.blueprint)
    app.register_blueprint(pages.blueprint)
    return app


def _name_request() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.has_request_id = is_request_id(given)
    g.request_id = given if g.has_request_id else uuid.uuid4().hex


def _add_headers(response: Response) -> Response:
    response.headers["x-request-id"] = g.request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    if g.get("quotas") is not None:
        response.headers.extend(errors.quota_headers(g.quotas))
    return response
