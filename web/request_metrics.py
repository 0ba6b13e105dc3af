"""Counts and times of HTTP requests, by the names that FastAPI servers of the field have for them.

`http_requests_total` by `handler`, `method` and `status`, and `http_request_duration_seconds` by `handler` and `method`: until the last
byte of the answer is sent, or its client has gone. A handler is a route, as `/v1/responses/<id>`, so that clients cannot make
up labels; probes and metrics are left out, which ask all the time. Each web process writes to files of its own in the folder that the
environment names (prometheus-client's multiprocess mode), and the supervisor adds them up. Knows nothing of prompts and answers.
"""

from __future__ import annotations

import time

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Histogram

NOT_COUNTED = ("/health", "/ping", "/metrics", "/load", "/version")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
OTHER = "none"  # the handler of what has no route, the method of what is not HTTP's
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# Of this process; where there are files, those are read instead.
registry = CollectorRegistry()
_requests = Counter(
    "http_requests", "Answers, by status class.", ["handler", "method", "status"], registry=registry
)  # fmt: skip
_seconds = Histogram(
    "http_request_duration_seconds", "From a request's headers to the end of its answer.", ["handler", "method"],
    buckets=_SECONDS, registry=registry,
)  # fmt: skip


def count_requests(app: Flask) -> None:
    """Count every answer of `app`. Ahead of what else may answer before a request: refusals count too."""

    def begin() -> None:
        g.counted_from = time.perf_counter()

    def end(response: Response) -> Response:
        if request.path.startswith(NOT_COUNTED):
            return response
        handler = OTHER if request.url_rule is None else request.url_rule.rule
        method = request.method if request.method in METHODS else OTHER
        status, begun = f"{response.status_code // 100}xx", g.counted_from

        def count() -> None:
            _requests.labels(handler, method, status).inc()
            _seconds.labels(handler, method).observe(time.perf_counter() - begun)

        response.call_on_close(count)
        return response

    app.before_request(begin)
    app.after_request(end)
