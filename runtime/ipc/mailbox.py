"""The engine's end of the socket between web processes and engine.

Knows ZeroMQ, the protocol's frames and which web process owns which live request; a `client` is a web process, by the
ZeroMQ identity of its connection. Knows nothing of scheduling: what a message means is for the engine. Used from one
thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from pagegraph.runtime.ipc.protocol import (
    HEARTBEAT_S,
    MAX_FRAME_BYTES,
    SILENCE_S,
    Abort,
    Failed,
    Submit,
    SubmitGroup,
    ToClient,
    ToEngine,
    Tokens,
    decode_to_engine,
    encode,
)

_log = logging.getLogger(__name__)
# One poll hands over at most this many frames, so that a flood cannot hold up a step.
_MAX_FRAMES_A_POLL = 1024
_MISSED_S = 2 * HEARTBEAT_S
# Lost web processes whose requests are remembered; one that died never comes to ask.
_MAX_CUT_OFF = 64


class Mailbox:
    """Messages of all web processes, received and sent without ever blocking on one of them.

    A web process that cannot take a message (it stopped reading, or went away) or that was silent for
    `lease_s` seconds and a heartbeat is lost: its live requests come out of `poll` as `Abort`. If it speaks again it
    is told of each by `Failed`.
    """

    def __init__(
        self,
        address: str,
        *,
        lease_s: float = SILENCE_S,
        wait_ms: int = 100,
        send_high_water: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind `address`, "ipc://" and a path; its folder is made with mode 0700.

        Raises ValueError on any other transport, PermissionError when others may enter the folder.
        """
        _private_folder(address)
        self.malformed = 0  # frames that were not messages
        self.lost_clients = 0
        self._wait_ms = wait_ms
        self._lease_s = lease_s
        self._clock = clock
        self._heard: dict[bytes, float] = {}
        self._silent: dict[bytes, float] = {}  # who missed a heartbeat, and when `poll` saw it
        self._live: dict[bytes, set[str]] = {}  # client -> its unfinished requests
        self._cut_off: dict[bytes, set[str]] = {}  # lost client -> requests it has not been told of
        self._aborts: list[tuple[bytes, ToEngine]] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, send_high_water)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to one that left is an error
        self._socket.bind(address)

    def poll(self, block: bool) -> list[tuple[bytes, ToEngine]]:
        """All messages that have come, as (client, message); with `block` wait up to `wait_ms` for the first."""
        if block and not self._aborts:
            self._socket.poll(self._wait_ms)
        messages, all_read = self._receive()
        if all_read:  # else the heartbeat of who seems silent may be among what waits
            self._expire()
        messages += self._aborts
        self._aborts = []
        return messages

    def send(self, client: bytes, message: ToClient) -> bool:
        """Send to one web process; False when it cannot take the message and is now lost."""
        try:
            self._socket.send_multipart([client, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self._lose(client)
            return False
        self._forget_finished(client, message)
        return True

    def close(self) -> None:
        """Close the socket; messages not yet taken are dropped."""
        self._socket.close()
        self._context.term()

    def _receive(self) -> tuple[list[tuple[bytes, ToEngine]], bool]:
        """Messages that have come, and whether these are all."""
        messages: list[tuple[bytes, ToEngine]] = []
        now = self._clock()
        for _ in range(_MAX_FRAMES_A_POLL):
            try:
                client, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages, True
            message = self._parse(frames)
            if message is None:
                continue
            self._heard[client] = now
            self._silent.pop(client, None)
            self._note(client, message)
            messages.append((client, message))
        return messages, False

    def _parse(self, frames: list[bytes]) -> ToEngine | None:
        try:
            (frame,) = frames
            return decode_to_engine(frame)
        except (ValueError, msgspec.MsgspecError, RecursionError, MemoryError):
            self.malformed += 1
            return None

    def _note(self, client: bytes, message: ToEngine) -> None:
        """Keep the web process's set of live requests, and tell a lost one what it lost."""
        for request_id in self._cut_off.pop(client, ()):
            self.send(client, Failed(request_id, 503, "the server lost touch with this request"))
        if isinstance(message, Submit):
            self._live.setdefault(client, set()).add(message.request_id)
        elif isinstance(message, SubmitGroup):
            self._live.setdefault(client, set()).update(member.request_id for member in message.members)
        elif isinstance(message, Abort):
            self._live.get(client, set()).discard(message.request_id)

    def _forget_finished(self, client: bytes, message: ToClient) -> None:
        live = self._live.get(client)
        if not live:
            return
        if isinstance(message, Tokens):
            live.difference_update(delta.request_id for delta in message.deltas if delta.finish_reason)
        elif isinstance(message, Failed):
            live.difference_update((message.request_id, *message.others))

    def _expire(self) -> None:
        """Lose who is silent, and was so a heartbeat ago: after a stall of the engine ZeroMQ has yet to read what came.

        Who missed a heartbeat is sent a message without content, which fails where its process has ended.
        """
        now = self._clock()
        for client, heard in list(self._heard.items()):
            if heard >= now - _MISSED_S:
                continue
            if client not in self._silent:
                self._silent[client] = now
                self.send(client, Tokens())
            elif heard < now - self._lease_s and now - self._silent[client] >= HEARTBEAT_S:
                self._lose(client)

    def _lose(self, client: bytes) -> None:
        self._heard.pop(client, None)
        self._silent.pop(client, None)
        requests = self._live.pop(client, set())
        self._aborts += [(client, Abort(request_id)) for request_id in requests]
        if requests:
            self.lost_clients += 1
            self._cut_off[client] = requests
            if len(self._cut_off) > _MAX_CUT_OFF:
                del self._cut_off[next(iter(self._cut_off))]
            _log.warning(
                "a web process cannot be reached, or was silent for %g s: its %d requests end",
                self._lease_s,
                len(requests),
            )


def _private_folder(address: str) -> None:
    transport, _, path = address.partition("://")
    if transport != "ipc" or not path.startswith("/"):
        raise ValueError(f"engine address must be ipc:///folder/name, not {address!r}")
    if len(path.encode()) > 107:
        raise ValueError(f"engine address path is {len(path.encode())} bytes long; a unix socket takes at most 107")
    folder = Path(path).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = folder.stat().st_mode & 0o777
    if mode & 0o077:
        raise PermissionError(f"{folder} has mode {mode:o}; the engine's socket needs a folder of mode 700")
