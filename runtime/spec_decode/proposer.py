"""Proposers search text for draft tokens: their interface, and the n-gram proposer.

A proposer sees slots of the input batch; its draft tokens follow their known tokens. A wrong draft token costs time,
never a wrong answer. Knows no scheduling, no acceptance and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pagegraph.kernels.spec_decode.reference import MAX_MATCH
from pagegraph.runtime.scheduler.input_batch import InputBatch


@dataclass(frozen=True, slots=True)
class Proposal:
    """Of R slots: tokens[i, :counts[i]] may follow, because the last matched[i] tokens have been seen before.

    int32; tokens [R, K], counts and matched [R]; matched 0: the draft tokens rest on no match; counts 0: there are
    none.
    """

    tokens: np.ndarray
    counts: np.ndarray
    matched: np.ndarray


class Proposer(Protocol):
    """Draft tokens by searching text that was written before: cheap, on the host."""

    def propose(self, batch: InputBatch, at: np.ndarray, limits: np.ndarray) -> Proposal:
        """At most limits[i] tokens for slot at[i]; int32 [R]. A slot may have tokens in flight: they are not looked at."""
        ...

    def ended(self, tokens: np.ndarray) -> None:
        """A sequence has generated these tokens, int32 [n], and ended: others may repeat them."""
        ...


class NgramProposer:
    """Finds the slot's last `least` to `most` tokens, as many as possible, earlier in the slot, and proposes what
    followed their latest occurrence.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least = least
        self.most = most

    def propose(self, batch: InputBatch, at: np.ndarray, limits: np.ndarray) -> Proposal:
        """See `Proposer`."""
        proposal = empty_proposal(len(at), int(limits.max(initial=0)))
        for i, slot in enumerate(at.tolist()):
            tokens = batch.tokens[slot, : batch.known[slot]]
            end, proposal.matched[i] = self.find(tokens)
            if end:
                proposal.counts[i] = count = limits[i]
                proposal.tokens[i, :count] = continuation(tokens, end, count)
        return proposal

    def ended(self, tokens: np.ndarray) -> None:
        """Nothing is kept of other sequences."""

    def find(self, tokens: np.ndarray) -> tuple[int, int]:
        """(where the match ends in `tokens` int32 [n], its length up to MAX_MATCH); (0, 0) if there is none."""
        last = len(tokens) - 1
        ends = np.flatnonzero(tokens[:last] == tokens[last])  # the last token of every match
        length = 1 if len(ends) else 0
        while 0 < length < self.most:
            longer = ends[ends >= length]
            longer = longer[tokens[longer - length] == tokens[last - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        if length < self.least:
            return 0, 0
        end = int(ends[-1])
        seen = min(MAX_MATCH, end + 1)
        differs = np.flatnonzero(tokens[end - seen + 1 : end + 1] != tokens[last - seen + 1 :])
        return end + 1, seen - 1 - int(differs[-1]) if len(differs) else seen


class NoProposer:
    """Searches nothing: the draft model alone drafts."""

    def propose(self, batch: InputBatch, at: np.ndarray, limits: np.ndarray) -> Proposal:
        """See `Proposer`."""
        return empty_proposal(len(at), int(limits.max(initial=0)))

    def ended(self, tokens: np.ndarray) -> None:
        """Nothing is kept."""


def continuation(tokens: np.ndarray, begin: int, count: int) -> np.ndarray:
    """`count` tokens from `begin` on; what runs into the end of `tokens` goes on with the period that it then has."""
    return tokens[begin + np.arange(count) % (len(tokens) - begin)]


def empty_proposal(num_slots: int, most: int) -> Proposal:
    """No draft tokens, with room for `most` a slot."""
    return Proposal(np.zeros((num_slots, most), np.int32), np.zeros(num_slots, np.int32), np.zeros(num_slots, np.int32))
