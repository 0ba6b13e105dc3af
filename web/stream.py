"""Deltas of the engine to pieces of text (`runtime.text.output`), and pieces to server-sent events.

Knows keep-alive and a client that left. Knows no OpenAI shapes.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from pagegraph.runtime.ipc.client import Group, RequestFailed
from pagegraph.runtime.ipc.protocol import TokenDelta
from pagegraph.runtime.text.output import Piece, TextOutput
from pagegraph.web.errors import ApiError, as_api_error

# How often a waiting request looks whether its client is still there.
_PEEK_S = 0.2  # five times a second and thread: 300 that wait take 5 % of a CPU
_MAX_PIECES_A_WRITE = 64
_PEEK_FLAGS = socket.MSG_PEEK | socket.MSG_DONTWAIT
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class ClientGone(Exception):
    """The client closed its connection."""


class NoTokens:
    """Stands for a group of `count` sequences that are to have no tokens: each ends at once, without the engine."""

    quotas = None  # nothing is counted

    def __init__(self, count: int) -> None:
        self.num_open = count

    def wait_admitted(self, timeout: float) -> bool:
        """Nothing could refuse them."""
        return True

    def get(self, timeout: float) -> tuple[int, TokenDelta]:
        """The end of the next one, the last first."""
        self.num_open -= 1
        return self.num_open, TokenDelta("", [], "length")

    def stop(self, index: int) -> None:
        """It has ended."""

    def abort(self) -> None:
        """None runs."""


@dataclass(slots=True)
class Generation:
    """All sequences of one request while they run. `close` aborts what is left and must be called.

    `fields`: what the user calls fields that the engine may find at fault.
    """

    group: Group | NoTokens
    outputs: list[TextOutput]
    client_gone: Callable[[], bool]
    on_close: Callable[[], None]
    fields: Mapping[str, str] = field(default_factory=dict)
    _peeked: float = field(default_factory=time.monotonic)
    _closed: bool = False

    def wait_admitted(self) -> None:
        """Wait until the engine takes the request, so that its refusal is a status and no late event.

        No token can come sooner. Raises ClientGone, RequestFailed or EngineDead.
        """
        while not self._named(self.group.wait_admitted, _PEEK_S):
            self._peek()

    def batches(self, keep_alive_s: float) -> Iterator[list[tuple[int, Piece]]]:
        """(index of the sequence, piece) as they come, all that wait at once; [] when none came for `keep_alive_s`.

        Raises ClientGone, RequestFailed or EngineDead.
        """
        quiet_since = time.monotonic()
        while self.group.num_open:
            pieces = self._waiting_pieces()
            self._peek()
            now = time.monotonic()
            if pieces or now - quiet_since >= keep_alive_s:
                quiet_since = now
                yield pieces

    def close(self) -> None:
        """Abort what still runs and give the request's place back; more calls do nothing."""
        if not self._closed:
            self._closed = True
            self.group.abort()
            self.on_close()

    def _waiting_pieces(self) -> list[tuple[int, Piece]]:
        pieces = []
        item = self._named(self.group.get, _PEEK_S)
        while item is not None:
            pieces.append((item[0], self._piece(*item)))
            more = self.group.num_open and len(pieces) < _MAX_PIECES_A_WRITE
            item = self._named(self.group.get, 0) if more else None
        return pieces

    def _named(self, ask: Callable[[float], T], timeout: float) -> T:
        """What `ask` gives; what it raises in the user's words."""
        try:
            return ask(timeout)
        except RequestFailed as error:
            first = error.field.partition(".")[0]
            if (own := self.fields.get(first)) is None:
                raise
            message = re.sub(rf"(?<![\w.]){first}(\.\w+)?(?!\w)", lambda _: own, error.message)
            raise error.renamed(message, own) from None

    def _piece(self, index: int, delta: TokenDelta) -> Piece:
        if delta.finish_reason in ("abort", "error"):
            raise RequestFailed(index, 503 if delta.finish_reason == "abort" else 500, "the server ended this request")
        piece = self.outputs[index].add(delta)
        if piece.finish_reason:
            self.group.stop(index)  # the engine knows of every end but that by a stop string
        return piece

    def _peek(self) -> None:
        now = time.monotonic()
        if now - self._peeked >= _PEEK_S:
            self._peeked = now
            if self.client_gone():
                raise ClientGone


def client_probe(environ: dict[str, Any]) -> Callable[[], bool]:
    """A function that says whether the request's client has closed its connection.

    gunicorn's threads notice that only when they write; so the socket is peeked at. A server that does
    not hand out its socket is taken to have its client.
    """
    sock = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if sock is None or not hasattr(sock, "recv"):
        return lambda: False

    def gone() -> bool:
        try:
            poll = select.poll()  # select() itself fails above 1024 file descriptors
            poll.register(sock, select.POLLIN)
            return bool(poll.poll(0)) and sock.recv(1, _PEEK_FLAGS) == b""
        except BlockingIOError:
            return False
        except ValueError:  # a TLS socket cannot be peeked at
            return False
        except OSError:
            return True

    return gone


def sse(event: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


class Events(Protocol):
    """What a stream says, one value an event, and how it is written."""

    end: bytes  # of the stream
    keep_alive: bytes  # while nothing comes

    def encode(self, event: Any) -> bytes:
        """One event as it is sent."""
        ...

    def first(self) -> list[Any]:
        """Before any token."""
        ...

    def events(self, index: int, piece: Piece) -> list[Any]:
        """Of one piece of the sequence at `index`; none where all its text is held back."""
        ...

    def last(self) -> list[Any]:
        """After every sequence has ended."""
        ...

    def failed(self, error: ApiError) -> list[Any]:
        """In place of `last`, where the generation failed."""
        ...


class EventStream:
    """The body of a streaming response. A class, for a generator that never started runs no `finally`."""

    def __init__(self, generation: Generation, events: Events, keep_alive_s: float) -> None:
        self._generation = generation
        self._body = self._write(events, keep_alive_s)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._body)

    def close(self) -> None:
        """Called by the server at the end of the response, also when the client left."""
        self._body.close()
        self._generation.close()

    def _write(self, events: Events, keep_alive_s: float) -> Generator[bytes, None, None]:
        def joined(values: Iterable[Any]) -> bytes:
            return b"".join(map(events.encode, values))

        try:
            yield joined(events.first()) or KEEP_ALIVE
            for pieces in self._generation.batches(keep_alive_s):
                body = joined(event for index, piece in pieces for event in events.events(index, piece))
                if body or not pieces:
                    yield body or events.keep_alive
            yield joined(events.last()) + events.end
        except ClientGone:
            return
        except Exception as error:
            yield joined(events.failed(as_api_error(error))) + events.end
        finally:
            self._generation.close()
