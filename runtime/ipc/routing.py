"""Which of several engines a request goes to: the one that can begin to answer it with the least left to do.

What an engine has to do is counted in tokens: those of prompts that it has not computed, the request's own that its prefix
cache lacks, and `REQUEST_TOKENS` for each sequence that it has, whose every step the request would share. So a cached prefix
of n tokens outweighs n more tokens in the queue, or n / REQUEST_TOKENS more sequences, and no more. Equal engines take
turns. An engine tells what it holds and has to do (`CacheChanged`); what was placed here since is added. Knows no sockets
and no threads.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pagegraph.runtime.ipc.protocol import CacheChanged
from pagegraph.runtime.scheduler.block_hashes import BlockHashes

# Of prompt, that a sequence an engine has is held to be worth: a choice, which no two devices would make alike. Four blocks
# of a shared system prompt do not outweigh a second stream; those of a conversation of some hundred tokens do.
REQUEST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Route:
    """What choosing needs to know of a request: `chains` are hashes of its prompts' full blocks, but for each last token's."""

    num_sequences: int
    num_tokens: int  # of its prompts, each counted once
    block_size: int
    chains: tuple[tuple[bytes, ...], ...] = ()

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], num_sequences: int, salt: str, hashes: BlockHashes) -> Route:
        """Of these prompts, with the salt that the engine will hash them with."""
        root, size = hashes.root(salt), hashes.block_size
        chains = (
            hashes.chain(root, array("i", prompt[: (len(prompt) - 1) // size * size]).tobytes()) for prompt in prompts
        )
        return cls(num_sequences, sum(map(len, prompts)), size, tuple(map(tuple, chains)))


NOWHERE = Route(0, 0, 0)  # of requests to the only engine


class Placed(Protocol):
    """A request that an engine was given."""

    route: Route
    admitted: bool  # the engine has said that it takes it
    begun: bool  # a token came
    num_open: int  # sequences that have not ended


@dataclass(slots=True)
class Engine:
    """One engine as far as it is known."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    stored: set[bytes] = field(default_factory=set)
    coming: Counter[bytes] = field(default_factory=Counter)  # of requests that were placed and have no token yet
    placed: dict[Placed, bool] = field(default_factory=dict)  # whether what it told counts them
    num_chosen: int = 0

    def cached_tokens(self, route: Route) -> int:
        """Of the request's prompts that it holds, or will when it comes to them."""
        return route.block_size * sum(self._cached_blocks(chain) for chain in route.chains)

    def _cached_blocks(self, chain: Iterable[bytes]) -> int:
        count = 0
        for digest in chain:
            if digest not in self.stored and digest not in self.coming:
                break
            count += 1
        return count

    def load(self) -> tuple[int, int]:
        """(sequences, tokens of prompts that are not computed): what it told, and what was placed since."""
        uncounted = [one for one, counted in self.placed.items() if not counted and one.num_open]
        return (
            self.num_requests + sum(one.route.num_sequences for one in uncounted),
            self.num_prompt_tokens + sum(one.route.num_tokens for one in uncounted),
        )

    def place(self, one: Placed) -> None:
        """It was given this request."""
        self.placed[one] = False
        self.coming.update(digest for chain in one.route.chains for digest in chain)

    def part_with(self, one: Placed) -> None:
        """The request is not its any more."""
        if self.placed.pop(one, None) is not None:
            self.coming -= Counter(digest for chain in one.route.chains for digest in chain)

    def forget_ended(self) -> None:
        """Part with what has ended."""
        for one in [one for one in self.placed if not one.num_open]:
            self.part_with(one)

    def learn(self, told: CacheChanged) -> None:
        """What it tells."""
        if told.cleared:
            self.stored = set()
        self.stored.difference_update(told.removed)
        self.stored.update(told.stored)
        self.num_requests, self.num_prompt_tokens = told.num_requests, told.num_prompt_tokens
        for one in list(self.placed):
            if one.begun or not one.num_open:
                self.part_with(one)
            else:
                self.placed[one] = one.admitted


def choose(engines: Sequence[Engine], route: Route, among: Iterable[int]) -> int:
    """The number of the engine to take, one of `among`, which must not be empty; it is its turn no more."""

    def cost(number: int) -> tuple[int, int, int, int]:
        engine = engines[number]
        requests, tokens = engine.load()
        left = tokens + route.num_tokens - engine.cached_tokens(route)
        return left + REQUEST_TOKENS * requests, requests, engine.num_chosen, number

    best = min(among, key=cost)
    engines[best].num_chosen += 1
    return best
