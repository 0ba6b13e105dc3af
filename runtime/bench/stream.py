"""One request to an OpenAI-compatible server, from the bytes of its body to the times of its answer's events.

A connection a request, opened before the clock starts, so that times are the server's and not those of TCP and TLS.
Knows HTTP/1.1 (through h11), server-sent events and the two streams of the OpenAI protocol; knows no schedule.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11
import msgspec

from pagegraph.runtime.bench.outcome import Outcome

ERROR_BYTES = 600  # kept of an answer that is no stream
DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def output(self) -> str | None:
        """What the event adds to the answer; None: nothing, it only opens or ends it."""
        if (delta := self.delta) is not None:
            text = f"{delta.reasoning or delta.reasoning_content or ''}{delta.content or ''}"
            return text if text or delta.tool_calls else None
        # Tokens that make no character yet come as an empty text.
        return None if self.text is None or (not self.text and self.finish_reason) else self.text


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True)
class Target:
    """Where requests go: a URL such as http://127.0.0.1:8000/v1/completions, and headers of every request."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    insecure: bool = False  # accept any TLS certificate

    def __post_init__(self) -> None:
        if self.parts.scheme not in ("http", "https") or not self.parts.hostname:
            raise ValueError(f"{self.url} is no address such as http://127.0.0.1:8000")

    @property
    def parts(self) -> SplitResult:
        return urlsplit(self.url)

    @property
    def is_chat(self) -> bool:
        return self.parts.path.rstrip("/").endswith("chat/completions")

    def request(self, body: bytes) -> bytes:
        """The bytes of one POST."""
        connection = h11.Connection(h11.CLIENT)
        path = self.parts.path or "/"
        target = f"{path}?{self.parts.query}" if self.parts.query else path
        given = {"content-type": "application/json"} | {name.lower(): value for name, value in self.headers.items()}
        fixed = {"host": self.parts.netloc.rpartition("@")[2], "content-length": str(len(body)), "connection": "close"}
        head = connection.send(h11.Request(method="POST", target=target, headers=[*(given | fixed).items()]))
        return (head or b"") + (connection.send(h11.Data(data=body)) or b"")

    def tls(self) -> ssl.SSLContext | None:
        """Made once a process: loading certificates takes milliseconds."""
        if self.parts.scheme == "http":
            return None
        context = ssl.create_default_context()
        if self.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context


class Stream(asyncio.Protocol):
    """The answer of one request; `outcome` is whole once `ended` is done."""

    def __init__(self, request: bytes, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.outcome = Outcome()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._clock = request, clock
        self._http = h11.Connection(h11.CLIENT)
        # What is sent is known in bytes; h11 has to know that a POST awaits its answer.
        self._http.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
        self._http.send(h11.EndOfMessage())
        self._status, self._line, self._body = 0, b"", b""
        self._texts: list[str] = []
        self._last = 0.0  # time of the event before
        self._finish = 0.0  # time of the event that says why the answer ended
        self._usage: _Usage | None = None
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.outcome.start_time = self._clock()
        transport.write(self._request)  # pyright: ignore[reportAttributeAccessIssue]

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        self._http.receive_data(data)
        self._read(now)

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        if exc is None and self._http.their_state is h11.SEND_BODY:
            self._http.receive_data(b"")  # which ends a body that has neither length nor chunks
            self._read(self._clock())
        self.end(f"the connection ended within the answer{f' ({exc})' if exc else ''}")

    def _read(self, now: float) -> None:
        try:
            while not self.ended.done():
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    return
                if isinstance(event, h11.Response):
                    self._status = event.status_code
                elif isinstance(event, h11.Data):
                    self._take(bytes(event.data), now)
                elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    self.end(self._missing())
        except (h11.RemoteProtocolError, msgspec.DecodeError) as error:
            self.end(f"not an answer of the OpenAI protocol: {error}")

    def _take(self, data: bytes, now: float) -> None:
        """Events of a piece of the body; a line may be in several."""
        if self._status != 200:
            self._body = (self._body + data)[:ERROR_BYTES]
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload == DONE:
                    self.end(self._missing())
                    return
                self._note(_decode(payload), now)
            elif line.startswith(b"{"):
                self._body = (self._body + line)[:ERROR_BYTES]

    def _note(self, event: _Event, now: float) -> None:
        if event.error is not None:
            self.end(f"the stream had an error: {str(event.error)[:ERROR_BYTES]}")
            return
        self._usage = event.usage or self._usage
        if not event.choices:
            return
        choice = event.choices[0]
        if choice.finish_reason:
            self._finish = now
        if (text := choice.output()) is None:
            return
        if self._last:
            self.outcome.itl.append(now - self._last)
        else:
            self.outcome.ttft = now - self.outcome.start_time
        self._last = now
        self._texts.append(text)

    def _missing(self) -> str:
        """What an answer lacks that has come to its end; empty: nothing."""
        if self._status != 200:
            return f"HTTP {self._status}: {self._body.decode(errors='replace')}"
        if not self._last and not self._finish:
            return f"an answer without output: {(self._body + self._line)[:ERROR_BYTES].decode(errors='replace')}"
        return ""

    def end(self, error: str) -> None:
        """The outcome is what has come so far; `error` is empty for a whole answer. The first call counts."""
        if self.ended.done():
            return
        outcome = self.outcome
        outcome.error = error
        if not self._last and self._finish:  # an answer of no text: the end of it is its first sign
            outcome.ttft = self._finish - outcome.start_time
            self._last = self._finish
        outcome.latency = self._last - outcome.start_time if self._last else 0.0
        outcome.text = "".join(self._texts)
        outcome.output_tokens = len(self._texts)
        if self._usage is not None:
            outcome.has_usage = True
            outcome.prompt_len, outcome.output_tokens = self._usage.prompt_tokens, self._usage.completion_tokens
        self.ended.set_result(None)
        if self._transport is not None:
            self._transport.close()


async def send(target: Target, tls: ssl.SSLContext | None, body: bytes, timeout: float) -> Outcome:
    """The outcome of one request, whatever becomes of it; `timeout` seconds for all of it."""
    parts = target.parts
    port = parts.port or (443 if tls else 80)
    stream = Stream(target.request(body))
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().create_connection(lambda: stream, parts.hostname or "", port, ssl=tls)
            await asyncio.shield(stream.ended)
    except TimeoutError:
        stream.end(f"no whole answer within {timeout:g} s")
    except OSError as error:
        return Outcome(start_time=time.perf_counter(), error=f"no connection to {parts.netloc}: {error}")
    return stream.outcome
