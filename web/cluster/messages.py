"""What the front and a replica say to each other: a request of HTTP, and the beginning of its answer.

Knows HTTP's names and nothing of Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pagegraph.runtime.ipc.routing import Route

Headers = list[tuple[bytes, bytes]]  # names as they came, in their order

# Of one connection alone (RFC 9110, 7.6.1), and a question that whoever has read the body has answered: not passed on.
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect")
)


@dataclass(eq=False)
class Request:
    """One request. What follows `body` stays in the front's process: `__getstate__` leaves it out."""

    method: str
    target: str  # path and query, as they were sent
    headers: Headers
    body: bytes
    front: str = ""  # which one sends it
    route: Route = Route(1, 0, 1)
    tried: set[str] = field(default_factory=set)  # replicas that are asked again only if there is no other
    begun: bool = False  # a replica has sent something of its answer's body
    ended: bool = False

    def __getstate__(self) -> tuple[Any, ...]:
        return self.method, self.target, self.headers, self.body, self.front

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)


@dataclass(frozen=True)
class Head:
    """The beginning of an answer; its body follows in pieces of bytes."""

    replica: str
    status: int
    headers: Headers


class ServerGone(Exception):
    """A replica's server does not answer: it has ended, or is about to."""


def end_to_end(headers: Headers) -> Headers:
    """Those that are passed on."""
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]
