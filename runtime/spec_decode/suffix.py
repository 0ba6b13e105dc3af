"""A proposer that remembers: it finds a slot's longest suffix earlier in the slot, or in the output of a sequence that
ended.

Outputs are kept in a suffix automaton (Blumer et al. 1985): it holds every substring of what it has read, takes
amortised constant time a token, and a text is followed through it a token at a time. Knows tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagegraph.kernels.spec_decode.reference import MAX_MATCH
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.spec_decode.proposer import NgramProposer, Proposal

HISTORY = 100_000  # tokens that are remembered; then the memory starts anew
LONGEST = 4096  # last tokens of a sequence that are added to it
BORDER = -1  # between two outputs


class Automaton:
    """All substrings of the tokens read so far. A place in it is (state, length of the match)."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [0]  # tokens read up to an occurrence of the state's strings
        self._last = 0

    def read(self, token: int) -> None:
        """Append one token. Places found before may then name a longer match than theirs."""
        self.tokens.append(token)
        new = self._state({}, self._length[self._last] + 1, len(self.tokens))
        at = self._last
        while at >= 0 and token not in self._next[at]:
            self._next[at][token] = new
            at = self._link[at]
        self._link[new] = 0 if at < 0 else self._suffix_of(at, token)
        self._last = new

    def follow(self, place: tuple[int, int], token: int) -> tuple[int, int]:
        """The place of the longest suffix that is in here, one token on."""
        state, length = place
        while state and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state]
        return (self._next[state][token], length + 1) if token in self._next[state] else (0, 0)

    def after(self, place: tuple[int, int], count: int) -> list[int]:
        """At most `count` tokens that followed an occurrence, up to the end of its output."""
        end = self._end[place[0]]
        follows = self.tokens[end : end + count]
        return follows[: follows.index(BORDER)] if BORDER in follows else follows

    def _state(self, next_: dict[int, int], length: int, end: int) -> int:
        self._next.append(next_)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    def _suffix_of(self, at: int, token: int) -> int:
        """The state of the longest string of `at` and `token`, split off where longer strings share its state."""
        target = self._next[at][token]
        if self._length[target] == self._length[at] + 1:
            return target
        split = self._state(dict(self._next[target]), self._length[at] + 1, self._end[target])
        self._link[split] = self._link[target]
        self._link[target] = split
        while at >= 0 and self._next[at].get(token) == target:
            self._next[at][token] = split
            at = self._link[at]
        return split


@dataclass(slots=True)
class Reader:
    """How far a slot has been followed through the automaton."""

    epoch: int
    version: int
    read: int
    place: tuple[int, int]


class SuffixProposer:
    """Matches of at least `least` tokens; of a slot's own match and the remembered one the longer proposes."""

    def __init__(self, least: int) -> None:
        self.least = least
        self._own = NgramProposer(least, MAX_MATCH)
        self._history = Automaton()
        self._version = 0  # of the history
        self._readers: dict[int, Reader] = {}  # by slot

    def propose(self, batch: InputBatch, at: np.ndarray, limits: np.ndarray) -> Proposal:
        """See `runtime.spec_decode.proposer.Proposer`."""
        proposal = self._own.propose(batch, at, limits)
        if self._history.tokens:
            for i, slot in enumerate(at.tolist()):
                self._remember(batch, slot, i, int(limits[i]), proposal)
        return proposal

    def ended(self, tokens: np.ndarray) -> None:
        """Read what the sequence generated, int32 [n]."""
        if len(self._history.tokens) + len(tokens) > HISTORY:
            self._history = Automaton()
        for token in [*tokens[-LONGEST:].tolist(), BORDER]:
            self._history.read(token)
        self._version += 1

    def _remember(self, batch: InputBatch, slot: int, index: int, limit: int, proposal: Proposal) -> None:
        epoch, known = int(batch.epoch[slot]), int(batch.known[slot])
        reader = self._readers.get(slot)
        if reader is None or (reader.epoch, reader.version) != (epoch, self._version):
            reader = self._readers[slot] = Reader(epoch, self._version, 0, (0, 0))
        if reader.read < known - MAX_MATCH:
            reader.read, reader.place = known - MAX_MATCH, (0, 0)
        for token in batch.tokens[slot, reader.read : known].tolist():
            reader.place = self._history.follow(reader.place, token)
        reader.read = known
        length = min(reader.place[1], MAX_MATCH)
        if length < self.least or length <= proposal.matched[index]:
            return
        follows = self._history.after(reader.place, limit)
        if follows:
            proposal.counts[index], proposal.matched[index] = len(follows), length
            proposal.tokens[index, : len(follows)] = follows
