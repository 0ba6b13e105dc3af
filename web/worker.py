"""The gunicorn worker: one loop reads all connections, threads answer whole requests.

A thread never waits for a request, and for a client that reads its answer only so long as
`send_timeout_s`; a client that sends half a request costs a socket. Requests other than POST have
threads of their own, so that probes are answered while every other thread holds a stream.

Knows gunicorn's worker interface (`gunicorn.workers.base`) and how it calls an application (`gunicorn.http.wsgi`).
Settings come from the application. Knows no routes.

A thread per connection that reads for itself is held by whoever sends half a request. h11 says where requests end;
gunicorn keeps the processes. What threads write waits `send_timeout_s` for a reader, with a small socket buffer, so
that a client that reads nothing is noticed while its stream runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from gunicorn.http import wsgi
from gunicorn.workers import base

from pagegraph.web.connection import Connection
from pagegraph.web.errors import ApiError
from pagegraph.web.request_reader import Request

SHORT_THREADS = 8  # for requests without a body, which are answered from memory
SHORT_SEND_TIMEOUT_S = 2.0  # their answers fit into what the kernel takes unread
SWEEP_S = 0.5  # between two looks at the deadlines
# Bodies above SMALL_BODY_BYTES are read only while all of them together fit into LARGE_BODIES_BYTES.
SMALL_BODY_BYTES = 256 << 10
LARGE_BODIES_BYTES = 24 << 20
HURRY_S = 5.0  # that a large body may pause while others wait for its budget
OTHER_FILES = 128  # descriptors a worker has beside its connections
ACCEPT_PAUSE_S = 0.25  # when the system has no descriptor or memory for another connection
STOP_LINGER_S = 2.0  # that a stopping worker waits for a request already on its way
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
WRITE_BYTES = 64 << 10  # of an answer at a time; the send time-out holds for each


class BodyBudget:
    """Bytes that large bodies may take while they are read and until they are answered; first come, first served."""

    def __init__(self, num_bytes: int) -> None:
        self._total = self._free = num_bytes
        self.waiting: deque[Connection] = deque()

    def acquire(self, connection: Connection) -> bool:
        """Whether the connection's body may be read on; else it waits for `release` to admit it."""
        need = min(connection.body_bytes, self._total)
        if connection.budget or need <= SMALL_BODY_BYTES:
            return True
        if self.waiting or need > self._free:
            self.waiting.append(connection)
            return False
        self._hold(connection, need)
        return True

    def release(self, connection: Connection) -> list[Connection]:
        """Take back what the connection holds or waits for; returns the connections admitted now."""
        self._free += connection.budget
        connection.budget = 0
        with contextlib.suppress(ValueError):
            self.waiting.remove(connection)
        admitted = []
        while self.waiting and (need := min(self.waiting[0].body_bytes, self._total)) <= self._free:
            admitted.append(self.waiting.popleft())
            self._hold(admitted[-1], need)
        return admitted

    def _hold(self, connection: Connection, need: int) -> None:
        self._free -= need
        connection.budget = need


class Worker(base.Worker):
    """One worker process. Only the loop touches its state; threads hand it functions to call."""

    def init_process(self) -> None:
        """Called by gunicorn in the new process; returns when the worker ends."""
        _free_large_blocks_at_once()
        self._selector = selectors.DefaultSelector()
        self._deferred: deque[Callable[[], None]] = deque()
        self._connections: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._body_budget = BodyBudget(LARGE_BODIES_BYTES)
        self._max_connections = _allow_files(self.cfg.worker_connections + OTHER_FILES, self.log) - OTHER_FILES
        self._threads = ThreadPoolExecutor(self.cfg.threads, thread_name_prefix="request")
        self._short_threads = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="short-request")
        self._accepting = False
        self._accept_after = 0.0
        self._swept = 0.0
        self._num_cut = 0
        super().init_process()

    def run(self) -> None:
        """The loop, until gunicorn says stop; then running requests have `graceful_timeout`."""
        self._settings = self.wsgi.extensions["pagegraph"].settings
        self._selector.register(self.PIPE[0], selectors.EVENT_READ, self._run_deferred)
        while self.alive and self.ppid == os.getppid():
            self._turn()
        self.alive = False
        stopped = time.monotonic()
        while self._connections and time.monotonic() < stopped + self.cfg.graceful_timeout:
            for connection in self._connections:
                connection.hasten(stopped + STOP_LINGER_S)
            self._turn()
        for connection in self._connections:  # threads that still answer see their clients gone
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        self._threads.shutdown(wait=False)
        self._short_threads.shutdown(wait=False)

    def _turn(self) -> None:
        now = time.monotonic()
        if now - self._swept >= SWEEP_S:
            self._swept = now
            self.notify()
            self._sweep(now)
        can_accept = len(self._connections) < self._max_connections or bool(self._idle)
        self._accept_or_not(self.alive and can_accept and now >= self._accept_after)
        for key, _ in self._selector.select(SWEEP_S):
            self._guarded(key.data)

    # New connections.

    def _accept_or_not(self, accepting: bool) -> None:
        if accepting == self._accepting:
            return
        self._accepting = accepting
        for listener in self.sockets:
            if accepting:
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
            else:
                self._selector.unregister(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, client = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # another worker was faster, or the client has left
        except OSError as error:
            if not self._close_idlest():
                self._accept_after = time.monotonic() + ACCEPT_PAUSE_S
                self.log.warning("no connection can be accepted (%s); %d are open", error, len(self._connections))
            return
        if len(self._connections) >= self._max_connections:
            self._close_idlest()
        connection = Connection(accepted, client, self._settings)
        self._connections.add(connection)
        self._watch(connection)
        self._idle[connection] = None

    def _close_idlest(self) -> bool:
        """Close the connection that has been idle longest, unless its next request has just come."""
        for connection in self._idle:
            if connection.lingering or not connection.has_unread():
                self._close(connection)
                return True
        return False

    # Connections that are read.

    def _watch(self, connection: Connection) -> None:
        self._selector.register(connection.socket, selectors.EVENT_READ, partial(self._readable, connection))

    def _readable(self, connection: Connection) -> None:
        if connection not in self._connections:
            return  # closed since the selector looked
        try:
            open_still = connection.receive()
        except OSError:
            open_still = False
        if open_still:
            self._process(connection)
        else:
            self._close(connection)

    def _process(self, connection: Connection) -> None:
        """With what has come so far: answer a whole request, wait for the rest of one, refuse what is none."""
        try:
            request = connection.request()
        except ApiError as error:
            self._refuse(connection, error)
            return
        if request is not None:
            self._unwatch(connection)
            self._answer_in_thread(connection, request)
        elif self._body_budget.acquire(connection):
            connection.invite_body()
            if not connection.idle:
                self._idle.pop(connection, None)
        else:
            self._unwatch(connection)

    def _unwatch(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection.socket)

    def _release_budget(self, connection: Connection) -> None:
        for admitted in self._body_budget.release(connection):
            admitted.last_read = time.monotonic()
            self._watch(admitted)
            self._process(admitted)

    def _refuse(self, connection: Connection, error: ApiError) -> None:
        self.log.debug("%s: %d %s", connection.client, error.status, error.message)
        self._unwatch(connection)
        connection.refuse(error)
        self._linger(connection)

    def _linger(self, connection: Connection) -> None:
        self._release_budget(connection)
        self._watch(connection)
        self._idle[connection] = None

    def _close(self, connection: Connection) -> None:
        self._unwatch(connection)
        self._connections.discard(connection)
        connection.socket.close()
        self._release_budget(connection)

    def _sweep(self, now: float) -> None:
        """Give up the connections whose time is over."""
        for connection in list(self._connections):
            waits = connection in self._body_budget.waiting
            too_slow = self._body_budget.waiting and connection.budget and now - connection.last_read > HURRY_S
            if now < connection.deadline and not (too_slow and connection.reads_body):
                continue
            error = connection.timed_out()
            if error is None:
                self._close(connection)
            else:
                self._refuse(connection, _crowded() if waits else error)

    # Whole requests.

    def _answer_in_thread(self, connection: Connection, request: Request) -> None:
        long = request.method == "POST"
        connection.socket.send_timeout_s = self._settings.send_timeout_s if long else SHORT_SEND_TIMEOUT_S
        (self._threads if long else self._short_threads).submit(self._answer, connection, request)

    def _answer(self, connection: Connection, request: Request) -> None:
        """In a thread: call the application and send what it says."""
        end: Callable[[Connection], None] = self._close
        response = None
        try:
            read: Any = request  # what `create` reads of gunicorn's own kind of request
            response, environ = wsgi.create(read, connection.socket, connection.client, connection.server, self.cfg)
            self._respond(connection, response, environ)
            end = self._finish if response.should_close() else self._keep_alive
        except TimeoutError as error:
            self._num_cut += 1
            connection.socket.drop_unsent()
            self.log.warning("an answer was cut: %s (%d so far)", error, self._num_cut)
        except OSError as error:
            self.log.debug("%s left: %s", connection.client, error)
        except Exception:
            self.log.exception("an unforeseen error")
            if response is None or not response.headers_sent:
                end = partial(self._refuse, error=ApiError(500, "internal error"))
        finally:
            self._defer(partial(end, connection))

    def _respond(self, connection: Connection, response: wsgi.Response, environ: MutableMapping[str, Any]) -> None:
        """Raises OSError when the client is gone, TimeoutError when it does not read."""
        environ["wsgi.multithread"] = True
        if not self.alive:
            response.force_close()
        start_response: Any = response.start_response  # gunicorn takes bytes of headers where WSGI has text
        body: Any = self.wsgi(environ, start_response)
        try:
            if connection.budget:  # the request has been read and understood
                self._defer(partial(self._release_budget, connection))
            for data in body:
                if len(data) <= WRITE_BYTES:
                    response.write(data)
                else:
                    for start in range(0, len(data), WRITE_BYTES):
                        response.write(data[start : start + WRITE_BYTES])
            response.close()
        finally:
            if hasattr(body, "close"):
                body.close()

    def _keep_alive(self, connection: Connection) -> None:
        connection.keep_alive(self.cfg.keepalive)
        self._watch(connection)
        self._idle[connection] = None
        self._process(connection)

    def _finish(self, connection: Connection) -> None:
        connection.linger()
        self._linger(connection)

    def _defer(self, function: Callable[[], None]) -> None:
        """Have the loop call `function`; from any thread."""
        self._deferred.append(function)
        with contextlib.suppress(OSError):  # a full pipe wakes the loop as well
            os.write(self.PIPE[1], b"\0")

    def _run_deferred(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.PIPE[0], 4096)
        for _ in range(len(self._deferred)):
            self._guarded(self._deferred.popleft())

    def _guarded(self, function: Callable[[], None]) -> None:
        """The loop outlives what goes wrong with one connection."""
        try:
            function()
        except Exception:
            self.log.exception("an unforeseen error in the loop")


def _crowded() -> ApiError:
    return ApiError(503, f"large requests of others take all {LARGE_BODIES_BYTES >> 20} MiB meant for them; try again")


def _free_large_blocks_at_once() -> None:
    """Have glibc give a freed body's memory back: after the first it would keep the holes, twice what bodies take."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL_BODY_BYTES)


def _allow_files(needed: int, log: Any) -> int:
    """Raise this process's limit of open files to `needed`, as far as the system lets it; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < needed:
        log.warning(
            "a worker may have %d files open; it would use %d, so it keeps fewer connections (ulimit -Hn)", soft, needed
        )
        return soft
    return needed
