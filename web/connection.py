"""One client's connection to a web process: its socket, what it has sent so far, and how long that may go on.

Knows sockets and time. Knows no threads and no selector: `web.worker` reads it.
"""

from __future__ import annotations

import contextlib
import email.utils
import select
import socket
import struct
import time
from typing import Any

from pagegraph.web.errors import ApiError
from pagegraph.web.request_reader import Request, RequestReader
from pagegraph.web.settings import WebSettings

# What the kernel keeps of an answer for a client that does not read: a stream of hundreds of tokens, not of
# thousands. Linux doubles the number.
SEND_BUFFER_BYTES = 128 << 10
RECEIVE_BYTES = 64 << 10
RECEIVE_CHUNKED_BYTES = 8 << 10  # a thousand chunks of one byte cost as much time as all else that is read at once
# Below this average a body is given up, once the time is over that a small one has at any pace.
SLOWEST_BODY_BYTES_S = 64 << 10
SMALL_BODY_S = 60.0
# A refused client is read on for so long: closed at once, the connection would take the answer with it.
LINGER_S = 2.0
LONGEST_LINGER_S = 30.0


class ClientSocket(socket.socket):
    """A socket that does not block, except that `sendall` waits for a client that reads, `send_timeout_s` at most."""

    send_timeout_s = 30.0

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send all of `data`. Raises TimeoutError when the client takes nothing of it for `send_timeout_s`."""
        try:
            sent = self.send(data, flags)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._send_slowly(memoryview(data)[sent:], flags)

    def _send_slowly(self, rest: memoryview, flags: int) -> None:
        poll = select.poll()
        poll.register(self, select.POLLOUT)
        while rest:
            if not poll.poll(1000 * self.send_timeout_s):
                raise TimeoutError(f"the client took nothing for {self.send_timeout_s:g} s")
            with contextlib.suppress(BlockingIOError):
                rest = rest[self.send(rest, flags) :]

    def drop_unsent(self) -> None:
        """Have `close` throw away what the client has not read; else the kernel would keep it for minutes."""
        with contextlib.suppress(OSError):
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Connection:
    """A client's connection while the loop reads it.

    `deadline` is the monotonic time at which it is given up, `last_read` the time of its last bytes. `budget` is what
    it holds of the worker's budget for large bodies, in bytes. `lingering` after an answer that closes: what still
    comes is thrown away.
    """

    def __init__(self, accepted: socket.socket, client: Any, settings: WebSettings) -> None:
        self.socket = ClientSocket(fileno=accepted.detach())
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # the client may be gone already
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.client = client
        self.server = self.socket.getsockname()
        self.last_read = time.monotonic()
        self.deadline = self.last_read + settings.header_timeout_s
        self.budget = 0
        self.lingering = False
        self._settings = settings
        self._reader = RequestReader(settings.max_body_bytes)
        self._phase, self._since = "idle", self.last_read

    @property
    def idle(self) -> bool:
        """The client loses nothing if it is closed: no request has begun."""
        return self.lingering or not self._reader.started

    @property
    def body_bytes(self) -> int:
        """What the body will take: 0 before the headers, the most that is allowed for one in chunks."""
        if not self._reader.head_read:
            return 0
        announced = self._reader.content_length
        return self._settings.max_body_bytes if announced is None else announced

    @property
    def reads_body(self) -> bool:
        """The headers have come, the whole body has not."""
        return self._phase == "body"

    def receive(self) -> bool:
        """Read once what has come, without waiting; False when the client has closed. Raises OSError."""
        chunked = self._reader.head_read and self._reader.content_length is None
        try:
            data = self.socket.recv(RECEIVE_CHUNKED_BYTES if chunked else RECEIVE_BYTES)
        except BlockingIOError:
            return True
        self.last_read = time.monotonic()
        if data and not self.lingering:
            self._reader.feed(data)
        return bool(data)

    def has_unread(self) -> bool:
        """Bytes have come that nobody has read yet, or the client has closed."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def request(self) -> Request | None:
        """The next request if it is whole; else None, and the deadline says how long the rest may take.

        Raises ApiError for what is no request.
        """
        request = None if self.lingering else self._reader.request()
        if request is None:
            self._set_deadline()
        else:
            self._phase, self.deadline = "answered", float("inf")
        return request

    def keep_alive(self, keep_alive_s: float) -> None:
        """The last request is answered; the next may begin within `keep_alive_s` seconds."""
        self._phase, self.last_read = "idle", time.monotonic()
        self.deadline = self.last_read + keep_alive_s

    def invite_body(self) -> None:
        """Tell a client that asked whether its body is wanted (Expect: 100-continue) that it is."""
        if invitation := self._reader.invite_body():
            with contextlib.suppress(OSError):
                self.socket.send(invitation)

    def refuse(self, error: ApiError) -> None:
        """Answer with an error and end the connection once the client has had time to read that."""
        with contextlib.suppress(OSError):
            self.socket.send(_closing_answer(error))
        self.linger()

    def hasten(self, deadline: float) -> None:
        """Have the rest of a request, or the next one, come before `deadline`; one that is being answered goes on."""
        if self._phase != "answered":
            self.deadline = min(self.deadline, deadline)

    def timed_out(self) -> ApiError | None:
        """What a client is told whose deadline is over; None where it has asked for nothing."""
        if self._phase == "head":
            return ApiError(408, f"the headers did not come within {self._settings.header_timeout_s:g} s")
        if self._phase == "body":
            return ApiError(408, f"the body came too slowly: {self._reader.received} bytes of it arrived")
        return None

    def linger(self) -> None:
        """Say that no more is sent, and read on for a while."""
        self.lingering = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self._set_deadline()

    def _set_deadline(self) -> None:
        reader, now = self._reader, time.monotonic()
        phase = "linger" if self.lingering else "body" if reader.head_read else "head" if reader.started else "idle"
        if phase != self._phase:
            self._phase, self._since = phase, now
        if phase == "linger":
            self.deadline = min(now + LINGER_S, self._since + LONGEST_LINGER_S)
        elif phase == "body":
            longest = SMALL_BODY_S + reader.received / SLOWEST_BODY_BYTES_S
            self.deadline = min(now + self._settings.body_timeout_s, self._since + longest)
        elif phase == "head":
            self.deadline = self._since + self._settings.header_timeout_s


def _closing_answer(error: ApiError) -> bytes:
    """An error as the bytes of a whole answer, after which the connection closes."""
    response = error.response()
    response.headers["Connection"] = "close"
    response.headers["Date"] = email.utils.formatdate(usegmt=True)
    response.headers["X-Content-Type-Options"] = "nosniff"
    head = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
    return f"HTTP/1.1 {response.status}\r\n{head}\r\n".encode("latin-1") + response.get_data()
