"""What the routes of one web process share: the engines, the tokenizer, and how many requests may hold its threads.

Knows no fields of requests and no shapes of responses.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from flask import current_app

from pagegraph.runtime.askers import has_share
from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.ipc.replicas import Replicas
from pagegraph.runtime.text.chat import Chat
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.web.errors import ApiError
from pagegraph.web.openai_responses.store import ResponseStore
from pagegraph.web.settings import WebSettings
from pagegraph.web.stream import ClientGone
from pagegraph.web.tracing import Tracing

_FREE_THREADS = 16  # of a worker's, kept free of generations so that short requests and probes are answered
_PEEK_S = 0.1  # between looks whether a client that waits for its turn is still there


class Service:
    """The engines, the tokenizer and the threads of one web process. Thread-safe."""

    def __init__(
        self, settings: WebSettings, tokenizer: Tokenizer, engine: Replicas, tracing: Tracing | None = None
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.engine = engine
        self.tracing = tracing
        self.chat = Chat(tokenizer, settings.tool_call_parser, settings.reasoning_parser)
        self.responses = ResponseStore(settings.response_store, settings.response_store_bytes)
        self.started = int(time.time())
        self._lock = threading.Lock()
        self._free_threads = settings.threads - min(_FREE_THREADS, settings.threads // 2)
        self._threads_of: Counter[str] = Counter()  # that each asker holds
        self._long_texts = threading.BoundedSemaphore(max(1, (os.cpu_count() or 1) // 2))
        _ = tokenizer.min_tokens  # made before the first request

    def admit(self, info: EngineInfo, asker: str) -> Callable[[], None]:
        """Take one of this worker's threads for one request of an asker; returns the function that gives it back.

        Raises ApiError 503 while the engine drains, or when no thread is left, or too few for one of several keys to have
        more. How many requests may run and wait is decided by the engine; with `threads: auto` it refuses before the threads run out.
        """
        if info.draining:
            raise ApiError(503, "the server is shutting down")
        if not self._take_thread(asker):
            threads, enough = self.settings.threads, self.settings.enough_threads
            more = (
                f"; {enough} (auto) would be enough" if threads < enough else ", enough for all that may run and wait"
            )
            whose = " that one key may hold" if asker else ""
            raise ApiError(503, f"all threads of this web process{whose} are taken: threads = {threads}{more}")
        return functools.partial(self._give_back, asker)

    def _take_thread(self, asker: str) -> bool:
        with self._lock:
            taken = has_share(asker, self._threads_of[asker], self._free_threads)
            self._free_threads -= taken
            self._threads_of[asker] += taken
            return taken

    def _give_back(self, asker: str) -> None:
        with self._lock:
            self._free_threads += 1
            self._threads_of[asker] -= 1

    @contextlib.contextmanager
    def long_text(self, client_gone: Callable[[], bool]) -> Iterator[None]:
        """Parse a large body or tokenise a long text inside this: few do at a time, to bound memory and CPU time.

        Raises ClientGone.
        """
        while not self._long_texts.acquire(timeout=_PEEK_S):
            if client_gone():
                raise ClientGone
        try:
            if client_gone():
                raise ClientGone
            yield
        finally:
            self._long_texts.release()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not served; no name means the one that is."""
        served = self.settings.served_model_name
        if name is not None and name != served:
            raise ApiError(
                404, f"the model {name[:200]!r} is not served; {served!r} is", param="model", code="model_not_found"
            )


def current_service() -> Service:
    """The service of the app that answers the current request."""
    return current_app.extensions["pagegraph"]
