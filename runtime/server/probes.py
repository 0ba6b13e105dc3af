"""The probe port: health and the engine's metrics in threads of the supervisor, whatever the web processes are busy with.

Knows HTTP. What health means is `health`'s to say.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, cast

from pagegraph.runtime.server import health
from pagegraph.runtime.server.health import Health
from pagegraph.runtime.server.listen import Unserved, connectable

log = logging.getLogger("pagegraph.supervisor")

CLIENT_TIMEOUT_S = 10.0  # for a client to send its request and take the answer
METRICS_TIMEOUT_S = 5.0
METRICS_TEXT = MappingProxyType({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
PLAIN_TEXT = MappingProxyType({"Content-Type": "text/plain; charset=utf-8"})

# What is fetched is on this machine: a proxy from the environment must not see it.
fetch = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Probes:
    """The probe listener, in its own threads. `address` is where this machine reaches it, as host:port."""

    def __init__(
        self,
        host: str,
        port: int,
        health: Callable[[], Health],
        metrics_urls: Callable[[], Sequence[str]],
        own_metrics: Callable[[], bytes],
    ) -> None:
        """Listen at once; port 0 takes a free one. Raises Unserved when the address is taken or not ours.

        `metrics_urls` are asked for each time, for every engine has its own, and a new one another; there are none while they
        load. `own_metrics` stand in front of the engines', and alone while there are none.
        """
        try:
            self._server = _Server(host, port, health, metrics_urls, own_metrics)
        except OSError as error:
            what = f"probe_port={port} on probe_host={host}: {error.strerror}"
            raise Unserved(f"{what}; choose another with --probe-port or --probe-host") from error
        self.address = connectable(self._server.server_address)
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        health: Callable[[], Health],
        metrics_urls: Callable[[], Sequence[str]],
        own_metrics: Callable[[], bytes],
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.health = health
        self.metrics_urls = metrics_urls
        self.own_metrics = own_metrics
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks name servers for the host's name

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("a probe's connection failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        server = cast(_Server, self.server)
        path = self.path.partition("?")[0]
        if path in health.PATHS:
            self._answer(*server.health().answer(path))
        elif path == "/metrics":
            self._answer(200, server.own_metrics() + _engine_metrics(server.metrics_urls()), METRICS_TEXT)
        else:
            self._answer(404, b"not found\n")

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = PLAIN_TEXT) -> None:
        # A client that left before its answer is no error of ours.
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("probe: " + format, *args)


def _engine_metrics(urls: Sequence[str]) -> bytes:
    """The metrics of all engines on one page; empty while there are none."""
    if len(urls) < 2:
        return b"".join(map(_fetched, urls))
    with ThreadPoolExecutor(len(urls)) as threads:  # one that hangs holds up none of the others
        return one_page(list(threads.map(_fetched, urls)))


def _fetched(url: str) -> bytes:
    try:
        with fetch(url, timeout=METRICS_TIMEOUT_S) as reply:
            return reply.read()
    except (OSError, urllib.error.URLError):
        return b""


def one_page(texts: Sequence[bytes]) -> bytes:
    """Texts in Prometheus' format as one: the samples of a metric stand together, below one line of help and of type."""
    families: dict[bytes, dict[bytes, None]] = {}  # by name: lines, in order
    for text in texts:
        name = b""
        for line in text.splitlines(keepends=True):
            if line.startswith(b"# HELP "):
                name = line.split(b" ", 3)[2]
            families.setdefault(name, {})[line] = None
    return b"".join(line for lines in families.values() for line in lines)
