"""A line of the log for each answer, written when it has been sent or its client has gone.

Who asked what of the server and how long it took; not a word of prompts and answers, and no key.
"""

from __future__ import annotations

import logging
import time
import urllib.parse

from flask import Flask, Response, g, request

from pagegraph.runtime.server.logs import FIELDS

log = logging.getLogger("pagegraph.requests")


def log_requests(app: Flask) -> None:
    """Write a line for every answer of `app` but those of probes, which ask all the time."""

    def begin() -> None:
        g.begun = time.perf_counter()

    def end(response: Response) -> Response:
        if request.path.startswith(("/health", "/ping", "/metrics")):
            return response
        fields = {
            "method": request.method,
            "path": urllib.parse.quote(request.path),
            "status": response.status_code,
            "request_id": g.request_id,
            "client": request.remote_addr or "",
        }
        begun = g.begun

        def write() -> None:
            fields["ms"] = round(1e3 * (time.perf_counter() - begun), 1)
            text = "{method} {path} {status} {ms} ms, {client}, {request_id}".format(**fields)
            log.info(text, extra={FIELDS: fields})

        response.call_on_close(write)
        return response

    app.before_request(begin)
    app.after_request(end)
