"""Bytes of one connection to whole HTTP/1.1 requests, cut wherever they may be.

Knows HTTP's framing, through h11, and which names `gunicorn.http.wsgi` reads from a request. Knows no sockets,
no time and no routes.
"""

from __future__ import annotations

import io
import urllib.parse
from typing import Any

import h11
from gunicorn.util import split_request_uri

from pagegraph.web.errors import ApiError, body_too_large

MAX_HEAD_BYTES = 64 << 10  # request line and headers, or the trailers of a chunked body
MAX_FIELDS = 100
MAX_TARGET_BYTES = 8190
MAX_METHOD_BYTES = 20
MAX_FRAMING_BYTES = 512 << 10  # sizes and extensions of chunks: bytes that are not the body
# A trailer that says where a message goes, how long it is or who sent it is a message smuggled behind another.
_NO_TRAILERS = {b"host", b"content-length", b"transfer-encoding", b"trailer", b"authorization", b"te"}


class Request:
    """One whole request as `gunicorn.http.wsgi.create` and `Response` read it.

    Headers whose name has an underscore are left out: in WSGI's names they would be other headers, or the
    server's own variables (SCRIPT_NAME). What proxies say of the client is a header like any other.
    """

    scheme = "http"
    proxy_protocol_info = None
    _expected_100_continue = False  # the connection answered that before the body came

    def __init__(self, head: h11.Request, headers: list[tuple[bytes, bytes]], body: Body) -> None:
        self.method = head.method.decode("ascii")
        self.uri = head.target.decode("ascii")
        parts = _split(self.uri)
        self.path, self.query, self.fragment = parts.path, parts.query, parts.fragment
        self.version = (1, int(head.http_version[2:]))
        self.headers = [
            (name.decode("ascii").upper(), value.decode("latin-1"))
            for name, value in headers
            if b"_" not in name and name != b"expect"
        ]
        self.body = body
        self._close = head.http_version < b"1.1" or b"close" in _words(headers, b"connection")

    def should_close(self) -> bool:
        """The client sends nothing after this request, or must not."""
        return self._close


class Body(io.BytesIO):
    """A request's body, let go once it is read: the answer may run for minutes after."""

    length = 0

    def append(self, data: bytes) -> None:
        """Take bytes as they arrive, before the first read."""
        self.length += self.write(data)

    def readinto(self, buffer: bytearray, /) -> int:
        """As of any binary stream."""
        count = super().readinto(buffer)
        self._let_go()
        return count

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any binary stream."""
        data = super().read(size)
        self._let_go()
        return data

    def _let_go(self) -> None:
        if self.length and self.tell() == self.length:
            self.length = 0
            self.seek(0)
            self.truncate()


class RequestReader:
    """Reads the requests of one connection. `feed` it what comes; `request` gives each once it is whole.

    While a request is incomplete: `started` is True from its first byte on, `head_read` from the end of its
    headers on; `received` counts bytes of its body.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._restart()

    def _restart(self) -> None:
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._request: Request | None = None  # known from the end of its headers on, its body still to come
        self._body = Body()
        self._wire_bytes = 0  # received of the headers, later of the body with its framing
        self.content_length: int | None = None  # None: not known, because the body is chunked or no headers came
        self.started = False

    @property
    def head_read(self) -> bool:
        return self._request is not None

    @property
    def received(self) -> int:
        return self._body.length

    def invite_body(self) -> bytes:
        """What to send a client that sends its body only when told to (Expect: 100-continue); else nothing."""
        if not self._parser.they_are_waiting_for_100_continue:
            return b""
        return self._parser.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")) or b""

    def feed(self, data: bytes) -> None:
        """Take bytes from the client."""
        if not self.started:
            data = data.lstrip(b"\r\n")  # some clients end a body with an empty line
        if data:
            self.started = True
            self._wire_bytes += len(data)
            self._parser.receive_data(data)

    def request(self) -> Request | None:
        """The next request if it is whole; what follows it stays for the next call. Raises ApiError: then the
        connection is to be closed, for where the next request starts is not known.
        """
        while True:
            event = self._next_event()
            if isinstance(event, h11.Request):
                self._take_head(event)
            elif isinstance(event, h11.Data):
                self._take_data(event)
            elif isinstance(event, h11.EndOfMessage):
                return self._whole(event)
            else:
                self._check_size()
                return None

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._parser.next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431 and self._request is None and b"\n" not in self._parser.trailing_data[0]:
                raise _target_too_long() from None
            if error.error_status_hint == 431:
                raise _head_too_large() from None
            said = str(error).partition(": b")[0]  # behind it h11 shows the bytes
            raise ApiError(error.error_status_hint, f"not valid HTTP/1.1: {said}") from None

    def _take_head(self, head: h11.Request) -> None:
        headers = [(name.lower(), value) for name, value in head.headers.raw_items()]  # faster than iterating
        sizes = {name: value for name, value in headers if name in (b"content-length", b"transfer-encoding")}
        if head.http_version not in (b"1.0", b"1.1"):
            raise ApiError(505, f"HTTP/{head.http_version.decode()} is not spoken here; use HTTP/1.1")
        if len(head.method) > MAX_METHOD_BYTES:
            raise ApiError(400, "not valid HTTP/1.1: no such method")
        if len(head.target) > MAX_TARGET_BYTES:
            raise _target_too_long()
        num_after = len(self._parser.trailing_data[0])
        if len(headers) > MAX_FIELDS or self._wire_bytes - num_after > MAX_HEAD_BYTES:
            raise _head_too_large()
        if len(sizes) > 1 or (head.http_version == b"1.0" and b"transfer-encoding" in sizes):
            raise ApiError(400, "not valid HTTP/1.1: Transfer-Encoding beside Content-Length, or in HTTP/1.0")
        if _words(headers, b"expect") - {b"100-continue"}:
            raise ApiError(417, "the only Expect that is met is 100-continue")
        if b"transfer-encoding" not in sizes:
            self.content_length = int(sizes.get(b"content-length", b"0"))
            if self.content_length > self._max_body_bytes:
                raise body_too_large(self._max_body_bytes)
        self._request = Request(head, headers, self._body)
        self._wire_bytes = num_after

    def _take_data(self, event: h11.Data) -> None:
        self._body.append(event.data)
        self._check_size()
        if self.content_length is None and self._wire_bytes - self.received > MAX_FRAMING_BYTES:
            raise ApiError(413, "the body comes in too many chunks; send larger ones, or a Content-Length")

    def _check_size(self) -> None:
        """Refuse a body that is too long, or will be once the chunk that has begun is there as it was announced."""
        lacking = 0
        if self.head_read and self.content_length is None:
            # Of h11's own, pinned by a test: its events are of data alone, and of a chunk none may have come yet.
            reader: Any = self._parser._reader
            lacking = reader._bytes_in_chunk
        if self.received + lacking > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)

    def _whole(self, event: h11.EndOfMessage) -> Request:
        if bad := sorted(_NO_TRAILERS.intersection(name for name, _ in event.headers)):
            raise ApiError(400, f"not valid HTTP/1.1: {bad[0].decode()} after the body")
        request, rest = self._request, self._parser.trailing_data[0]
        assert request is not None
        request.body.seek(0)
        self._restart()
        self.feed(rest)
        return request


def _split(target: str) -> urllib.parse.SplitResult:
    """The target as path and query; `http://host/path` is the path alone, and a host is none."""
    try:
        parts = split_request_uri(target)
    except ValueError:
        parts = None
    if parts is None or not parts.path.startswith("/"):
        raise ApiError(400, "not valid HTTP/1.1: the target must be a path that starts with /")
    return parts


def _words(headers: list[tuple[bytes, bytes]], name: bytes) -> set[bytes]:
    """The comma-separated words of a header, in lower case."""
    return {word.strip() for found, value in headers if found == name for word in value.lower().split(b",")}


def _head_too_large() -> ApiError:
    return ApiError(431, f"headers may have {MAX_FIELDS} fields and {MAX_HEAD_BYTES} bytes together")


def _target_too_long() -> ApiError:
    return ApiError(414, f"the URL is longer than {MAX_TARGET_BYTES} bytes")
