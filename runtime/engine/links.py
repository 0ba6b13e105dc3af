"""Connections between the processes that share a model, on one machine and between several: messages in frames over sockets.

What the first rank tells is pickled: who listens to it trusts it. What it is told is words, since it need trust nobody who
reaches its port. Knows sockets; imports no torch.
"""

from __future__ import annotations

import json
import pickle
import socket
import time
from typing import Any

MOST_WORDS = 1 << 20  # bytes of a message to the first rank
# Seconds: a machine that went away without a word is missed after the first and three of the second.
QUIET_S, ASK_S, ASKS = 10, 5, 3
LOOK_S = 0.2  # between attempts to reach who does not listen yet


def put(to: socket.socket, content: bytes) -> None:
    """One frame: its length in 8 bytes, then the content. Raises OSError."""
    to.sendall(len(content).to_bytes(8, "little") + content)


def frame(of: socket.socket, most: int | None = None) -> bytes | None:
    """The next frame's content; None where the other end has closed, does not answer in the socket's time, or has more than `most` bytes."""
    size = _exactly(of, 8)
    if size is None:
        return None
    count = int.from_bytes(size, "little")
    return None if most is not None and count > most else _exactly(of, count)


def send(to: socket.socket, *message: Any) -> None:
    """A message of the first rank's. Raises OSError."""
    put(to, pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(of: socket.socket) -> tuple[Any, ...] | None:
    """The first rank's next message; None as `frame`."""
    content = frame(of)
    return None if content is None else pickle.loads(content)


def say(to: socket.socket, *words: str) -> None:
    """Words to the first rank. Raises OSError."""
    put(to, json.dumps(words).encode())


def heard(of: socket.socket) -> list[str] | None:
    """The next words that the first rank is told; None as `frame`, and for what are no words."""
    content = frame(of, MOST_WORDS)
    try:
        words = None if content is None else json.loads(content)
    except ValueError:
        return None
    return words if isinstance(words, list) and words and all(isinstance(word, str) for word in words) else None


def listen(host: str, port: int) -> socket.socket:
    """At that address alone; port 0 takes a free one. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def reach(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to who listens there, or comes to in so many seconds. Raises OSError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), LOOK_S))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)
        else:
            if connection.getsockname() == connection.getpeername():  # nobody listens: it has reached itself
                connection.close()
                continue
            connection.settimeout(None)
            watch(connection)
            return connection


def watch(connection: socket.socket) -> None:
    """Send small messages at once, and let a connection between machines end where the other one is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", QUIET_S), ("TCP_KEEPINTVL", ASK_S), ("TCP_KEEPCNT", ASKS)):
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    if (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
        connection.setsockopt(socket.IPPROTO_TCP, option, 1000 * (QUIET_S + ASK_S * ASKS))


def _exactly(of: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        try:
            part = of.recv(min(count, 1 << 20))
        except OSError:
            part = b""
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
