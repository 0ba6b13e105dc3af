"""One engine as a web process sees it: its facts, sequences to submit, their tokens. For many threads.

Knows groups of sequences and what ends them. Sockets and the engine's death are `connection`'s; it starts at first use,
so after gunicorn's fork.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from pagegraph.runtime.askers import NOBODY, Asker
from pagegraph.runtime.ipc.connection import (
    Comeback,
    Connection,
    EngineDead,
    Front,
    Inbox,
    Item,
    OpenGroup,
    RequestFailed,
)
from pagegraph.runtime.ipc.protocol import (
    HEARTBEAT_S,
    SILENCE_S,
    Abort,
    Admitted,
    EngineInfo,
    Failed,
    Member,
    Quotas,
    SubmitGroup,
    Timeline,
    TokenDelta,
)
from pagegraph.runtime.ipc.routing import NOWHERE, Route
from pagegraph.runtime.sampling_params import SamplingParams


class Group:
    """Sequences submitted together, read by one thread."""

    def __init__(self, opened: OpenGroup) -> None:
        self.request_ids = opened.request_ids
        self.opened = opened
        self._inbox = opened.inbox
        self._open = set(range(len(self.request_ids)))
        self._front: tuple[int, Item] | None = None
        self.quotas: Quotas | None = None  # what was left of the limits of the key when it was admitted

    @property
    def num_open(self) -> int:
        """Sequences that are not finished, failed or aborted."""
        return len(self._open)

    def get(self, timeout: float | None) -> tuple[int, TokenDelta] | None:
        """The next (index, delta), or None when `timeout` seconds pass; 0 does not wait.

        Raises RequestFailed for one sequence, or for all where the group was refused; EngineDead for all.
        Call only while `num_open`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            item = self._next(None if deadline is None else deadline - time.monotonic())
            if item is None:
                return None
            index, content = item
            if isinstance(content, EngineDead):
                self._open.clear()
                raise content
            if isinstance(content, Admitted):
                continue
            if index not in self._open:
                continue  # was on its way when the sequence was aborted
            if isinstance(content, Failed):
                self._open.discard(index)
                if content.others:
                    self._open.clear()
                raise RequestFailed(
                    index, content.status, content.message, content.field, content.retry_after_s, content.quotas
                )
            if content.finish_reason:
                self._open.discard(index)
            return index, content

    def wait_admitted(self, timeout: float) -> bool:
        """Whether the engine admits the group within `timeout` seconds. Raises as `get` does if it refuses it."""
        if self._front is None:
            self._front = self._next(timeout)
        first = None if self._front is None else self._front[1]
        if isinstance(first, Failed | EngineDead):
            self.get(0)
        if isinstance(first, Admitted):
            self.quotas = first.quotas
        return self._front is not None

    def abort(self) -> None:
        """Stop all sequences that are open; no more deltas come for them."""
        for index in list(self._open):
            self._end(index, Abort(self.request_ids[index]))

    def stop(self, index: int) -> None:
        """End one sequence for what its text says: a stop string was found. No more deltas come for it."""
        if index in self._open:
            self._end(index, Abort(self.request_ids[index], "stop"))

    def _end(self, index: int, message: Abort) -> None:
        self._open.discard(index)
        self.opened.abort(message)

    def _next(self, timeout: float | None) -> tuple[int, Item] | None:
        if self._front is not None:
            item, self._front = self._front, None
            return item
        try:
            if timeout is not None and timeout <= 0:
                return self._inbox.get_nowait()
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None


class Stream:
    """One sequence: iterating gives its deltas up to and with the one that has a finish reason."""

    def __init__(self, group: Group, timeout: float | None) -> None:
        self.request_id = group.request_ids[0]
        self._group = group
        self._timeout = timeout

    def get(self, timeout: float | None) -> TokenDelta | None:
        """The next delta, or None when `timeout` seconds pass."""
        item = self._group.get(timeout)
        return None if item is None else item[1]

    def __iter__(self) -> Iterator[TokenDelta]:
        while self._group.num_open:
            delta = self.get(self._timeout)
            if delta is None:
                raise TimeoutError(f"no token for {self._timeout} s")
            yield delta

    def abort(self) -> None:
        """Stop the sequence; the engine frees its blocks."""
        self._group.abort()


class EngineClient:
    """What a web process knows of the engine. Thread-safe; survives a fork by connecting anew.

    `comeback`: whether a new engine follows when this one ends; requests without a token yet wait for it then.
    `is_started`: whether one is being started, for a connection that never heard of the one before. `on_timeline` is told of
    each sequence that had a `trace` and ended, in the thread of the connection. `front`: who has this engine among others.
    """

    def __init__(
        self,
        address: str,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        silence_s: float = SILENCE_S,
        comeback: Comeback = lambda: None,
        is_started: Callable[[], bool] = lambda: False,
        on_timeline: Callable[[Timeline], None] = lambda _: None,
        front: Front | None = None,
    ) -> None:
        self._address = address
        self._comeback = comeback
        self._is_started = is_started
        self._on_timeline = on_timeline
        self._front = front
        self._heartbeat_s = heartbeat_s
        self._silence_s = silence_s
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        # A lock held by another thread during fork would stay locked in the child.
        os.register_at_fork(after_in_child=self._after_fork)

    def info(self, timeout: float | None = None) -> EngineInfo:
        """The engine's newest facts, at most a heartbeat old.

        Waits up to `timeout` seconds for an answer; by default only for a new connection's first, up to
        the silence limit, so that requests to a dead engine, or to one that is being started, fail at once. Raises
        EngineDead.
        """
        return self.connection.info(timeout)

    @property
    def silent_s(self) -> float:
        """Seconds since the engine was heard last; it answers each heartbeat between two steps."""
        return self.connection.silent_s

    @property
    def is_up(self) -> bool:
        """Whether the engine has answered, and has not gone away since; nobody connects for this."""
        connection = self._connection
        return connection is not None and connection.is_up

    def submit(
        self,
        token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Stream:
        """Start one sequence; iterating waits at most `timeout` seconds for each delta. Raises EngineDead."""
        return Stream(self.submit_group([(token_ids, params)], priority, cache_salt), timeout)

    def submit_group(
        self,
        sequences: Sequence[tuple[list[int], SamplingParams]],
        priority: int = 0,
        cache_salt: str = "",
        asker: Asker = NOBODY,
        label: str = "",
        trace: str = "",
        route: Route = NOWHERE,
    ) -> Group:
        """Start several sequences that one thread reads; the engine takes all of them or none.

        Raises EngineDead, and RequestFailed if they are too long for one message.
        """
        connection = self.connection
        connection.info(None)
        inbox: Inbox = queue.SimpleQueue()
        prompts = {id(token_ids): token_ids for token_ids, _ in sequences}
        places = {key: place for place, key in enumerate(prompts)}
        members = [Member(connection.new_id(), places[id(token_ids)], params) for token_ids, params in sequences]
        opened = connection.open(
            SubmitGroup(
                prompts=list(prompts.values()),
                members=members,
                priority=priority,
                cache_salt=cache_salt,
                asker=asker,
                label=label,
                trace=trace,
            ),
            inbox,
            route,
        )
        return Group(opened)

    def recent(self, asker: str, timeout: float) -> list[Timeline]:
        """What became of the last sequences of one asker, the newest last. Raises EngineDead."""
        return self.connection.recent(asker, timeout).timelines

    def close(self) -> None:
        """Stop the background thread; open streams end with EngineDead."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @property
    def connection(self) -> Connection:
        """The one that lives; a new one where there is none."""
        with self._lock:
            if self._connection is None or not self._connection.running:
                self._connection = Connection(
                    self._address,
                    self._heartbeat_s,
                    self._silence_s,
                    self._comeback,
                    self._is_started,
                    self._on_timeline,
                    self._front,
                )
            return self._connection

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._connection = None
