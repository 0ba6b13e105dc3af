"""A replica: a server of its own behind it, to which it hands requests, and whose health and load it tells Ray.

Knows Ray's hooks of a deployment and HTTP. What a request means is the server's to say.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp
from ray import serve
from yarl import URL

from pagegraph.runtime.doctor.rules import Metrics
from pagegraph.web.cluster.autoscaling import RUNNING, WAITING
from pagegraph.web.cluster.messages import Head, Request, ServerGone, end_to_end
from pagegraph.web.cluster.placement import CACHED_TOKENS, READY, REQUESTS
from pagegraph.web.cluster.server import Server

log = logging.getLogger("pagegraph.replica")

PROBE_S = 10.0  # for a server to answer a probe
NO_BODY = ("GET", "HEAD", "OPTIONS", "DELETE")  # without a length where there is none


class Replica:
    """`config` and `keys` as `Server` has them. Its constructor returns once the server answers."""

    def __init__(self, config: str, keys: Mapping[str, Any]) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self._http: aiohttp.ClientSession | None = None
        self._requests: Counter[str] = Counter()  # that are being answered, by front
        self._server = Server(config, keys, self._end)

    async def forward(self, request: Request) -> AsyncGenerator[Head | bytes, None]:
        """The answer: its head, then its body as it comes. Whoever leaves it ends the request.

        Raises ServerGone where the server breaks off, or is not there.
        """
        url = URL(f"http://{self._server.serving.address}{request.target}", encoded=True)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in end_to_end(request.headers)]
        body = request.body if request.body or request.method not in NO_BODY else None
        skipped = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")  # which aiohttp would add by itself
        self._requests[request.front] += 1
        try:
            asked = self._session().request(
                request.method, url, headers=headers, data=body, allow_redirects=False, skip_auto_headers=skipped
            )
            async with asked as answer:
                yield Head(self._name, answer.status, end_to_end(list(answer.raw_headers)))
                async for piece in answer.content.iter_any():
                    yield piece
        except aiohttp.ClientError as error:
            raise ServerGone(f"the server of replica {self._name} broke off: {error}") from None
        finally:
            self._requests[request.front] -= 1

    async def check_health(self) -> None:
        """Raise where only a new replica helps: /health/live, which an engine that is being started anew leaves at 200."""
        if (status := (await self._probe("/health/live"))[0]) != 200:
            raise RuntimeError(f"/health/live of replica {self._name} answers {status}")

    async def record_routing_stats(self) -> dict[str, Any]:
        """What fronts choose by; see `web.cluster.placement`."""
        ready = (await self._probe("/health/ready"))[0] == 200
        return {READY: ready, REQUESTS: dict(+self._requests), CACHED_TOKENS: self._server.serving.cached_tokens}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `web.cluster.autoscaling` goes by. Zeros while an engine loads, which has no metrics."""
        _, text = await self._probe("/metrics")
        metrics = Metrics(text)
        return {name: metrics(name) for name in (RUNNING, WAITING)}

    def __del__(self) -> None:
        """Called by Ray at the end of a replica, once its requests have ended or had their time."""
        server = getattr(self, "_server", None)  # none, where the constructor raised
        if server is not None:
            server.stop()

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:  # in the loop that it is used in
            # A connection for each request: closing it is how a server learns that its client has left.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._http = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=PROBE_S),
            )
        return self._http

    async def _probe(self, path: str) -> tuple[int, str]:
        url = f"http://{self._server.serving.probe_address}{path}"
        async with self._session().get(url, timeout=aiohttp.ClientTimeout(total=PROBE_S)) as answer:
            return answer.status, await answer.text()

    def _end(self, how: str) -> None:
        """The server has ended by itself. So does this process: Ray starts another one at once, and need not find out first."""
        log.critical("replica %s ends: %s", self._name, how)
        os._exit(1)
