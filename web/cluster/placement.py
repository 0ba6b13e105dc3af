"""Which replica a request goes to: the one that can begin to answer it with the least left to do.

As `runtime.ipc.routing` chooses among the engines of one server, in the same unit, but by less: replicas are other machines, so
a front knows of their prefix caches what it has sent them itself, as text, and of other fronts' requests what replicas tell once
a second. Prompts are compared as the JSON of what a chat template puts first, in blocks of 64 bytes, which stand for 16 tokens.
Knows no Ray and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pagegraph.runtime.ipc.routing import REQUEST_TOKENS, Route
from pagegraph.runtime.scheduler.block_hashes import TOKEN_BYTES, BlockHashes, new_key
from pagegraph.web.cluster.messages import Request

BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
# In the order of what a prompt is made of, whatever the order of the body: fields of chats, completions, responses, messages.
PROMPT_FIELDS = ("tools", "system", "instructions", "previous_response_id", "messages", "prompt", "input")

UNTOLD_BLOCKS = 1 << 16  # of a replica that has not said how much its cache holds: a million tokens, 3 MB here

# What a replica tells (`Replica.record_routing_stats`), by name; of `REQUESTS` that it answers their number by front.
READY, REQUESTS, CACHED_TOKENS = "ready", "requests", "cached_tokens"


class Prompts:
    """Bodies of requests to routes, with a key of this process alone."""

    def __init__(self) -> None:
        self._hashes = BlockHashes(BLOCK_TOKENS, new_key())

    def route(self, body: bytes, key: str) -> Route:
        """Of a request with this body; prompts of another `key` share nothing with it. A body that is no JSON has no prefix."""
        text = prompt_text(body)
        full = text[: len(text) // BLOCK_BYTES * BLOCK_BYTES]
        chain = self._hashes.chain(self._hashes.root(key), full)
        return Route(1, len(text) // TOKEN_BYTES, BLOCK_TOKENS, (tuple(chain),))


def prompt_text(body: bytes) -> bytes:
    """What of a body becomes its prompt, in an order of our own."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return b""
    if not isinstance(fields, dict):
        return b""
    return b"".join(msgspec.json.encode(fields[name]) for name in PROMPT_FIELDS if fields.get(name))


@dataclass(slots=True)
class _Replica:
    ready: bool = True
    requests: Mapping[str, int] = field(default_factory=dict)  # that it answers, as it tells, by front
    num_blocks: int = UNTOLD_BLOCKS  # of text that its cache may hold
    sent: dict[bytes, None] = field(default_factory=dict)  # blocks of prompts, the longest unused first
    placed: dict[Request, int] = field(default_factory=dict)  # of this front: tokens to compute before the first one
    num_chosen: int = 0

    def left(self, route: Route) -> int:
        """Tokens of a request's prompt that it lacks."""
        held = 0
        for chain in route.chains:
            for digest in chain:
                if digest not in self.sent:
                    break
                held += 1
        return route.num_tokens - held * route.block_size

    def place(self, request: Request) -> None:
        self.num_chosen += 1
        self.placed[request] = self.left(request.route)
        for chain in request.route.chains:
            for digest in reversed(chain):  # a prefix is forgotten after what follows it
                self.sent.pop(digest, None)
                self.sent[digest] = None
        while len(self.sent) > self.num_blocks:
            del self.sent[next(iter(self.sent))]


class Placement:
    """What a front knows of the replicas, by name. Not for several threads."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}

    def update(self, told: Mapping[str, Mapping[str, Any]]) -> None:
        """These replicas there are, and what each has told last; {}: nothing yet."""
        for name in self._replicas.keys() - told.keys():
            del self._replicas[name]
        for name, stats in told.items():
            one = self._replicas.setdefault(name, _Replica())
            if stats:
                one.ready, one.requests = bool(stats[READY]), stats[REQUESTS]
                one.num_blocks = int(stats[CACHED_TOKENS]) // BLOCK_TOKENS

    def choose(self, request: Request, among: Iterable[str]) -> str:
        """The replica to take, one of `among`, which must not be empty; the request counts as its from now on.

        One that the request has tried, or that is not ready, is taken only where there is no other.
        """
        for one in self._replicas.values():
            for placed in [placed for placed in one.placed if placed.ended or placed is request]:
                del one.placed[placed]
        best = min(among, key=lambda name: self._cost(name, request))
        self._replicas[best].place(request)
        return best

    def _cost(self, name: str, request: Request) -> tuple[Any, ...]:
        one = self._replicas[name]
        left = sum(tokens for placed, tokens in one.placed.items() if not placed.begun) + one.left(request.route)
        others = sum(count for front, count in one.requests.items() if front != request.front)
        num_requests = others + len(one.placed)
        cost = left + REQUEST_TOKENS * num_requests
        return name in request.tried, not one.ready, cost, num_requests, one.num_chosen, name
