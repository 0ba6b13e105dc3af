"""Addresses that a server listens on: a bound socket, a free port, and how this machine reaches them.

Knows sockets and how to say to a user that an address cannot be had. Knows no HTTP and no processes.
"""

from __future__ import annotations

import socket
from typing import Any


class Unserved(Exception):
    """The server could not start or did not stay up; the message is for the user."""


def bind(host: str, port: int, key: str) -> socket.socket:
    """A bound socket that does not listen yet: the port is ours while the model loads, and connections are refused.

    Raises Unserved naming `key` when the address is taken or unknown.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise Unserved(f"host={host}: {error.strerror}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise Unserved(
            f"{key}={port} on {host}: {error.strerror}; choose another with --{key}, or --{key} 0 for any free one"
        ) from error
    return bound


def connectable(address: tuple[Any, ...]) -> str:
    """host:port that a client on this machine can use for a listener's address."""
    host = str(address[0])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
