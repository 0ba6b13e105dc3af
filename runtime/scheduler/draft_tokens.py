"""Draft tokens in a step: how the plan schedules them, and how many of them the target model accepts.

A draft token is scheduled as a query of its own behind its slot's last known token: the same slot, one token, the next
position. A step writes the keys and values of all its queries before any of them attends, so a query sees the draft
tokens before it and samples what a step of its own would have sampled: noise depends on (seed, position, token) alone.
A draft token is accepted exactly if the query before it sampled that token, so requests get the tokens of a run without
draft tokens. Pure arithmetic over arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

# Of a plan: slots, epochs, starts, counts, sampled; arrays [N].
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Tokens that may follow: tokens[i, :counts[i]] in slot slots[i], counts at least 1; int32 [R], [R], [R, K].

    tokens None: the device proposed them, and only the device knows them; token j of a slot is then -2 - j, which may
    also stand in `tokens` where the others are known. forced: bool [R], those that grammars leave no choice about, where
    there are any.
    """

    slots: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray | None
    forced: np.ndarray | None = None

    def of_slots(self, num_slots: int) -> np.ndarray:
        """int32 [num_slots], how many each slot has."""
        counts = np.zeros(num_slots, np.int32)
        counts[self.slots] = self.counts
        return counts


@dataclass(frozen=True, slots=True)
class ScheduledDrafts:
    """The draft tokens of a plan: slot slots[i] has the queries first[i] .. first[i] + counts[i]; int32 [R]."""

    slots: np.ndarray
    counts: np.ndarray
    first: np.ndarray
    others: np.ndarray  # bool [S]: queries of slots without draft tokens
    tokens: np.ndarray | None  # int32 [R, K] as in `DraftTokens`
    forced: np.ndarray | None = None  # bool [R] as in `DraftTokens`

    def among(self, kept: np.ndarray) -> ScheduledDrafts:
        """Of the slots where kept bool [R]."""
        tokens = self.tokens if self.tokens is None else self.tokens[kept]
        forced = self.forced if self.forced is None else self.forced[kept]
        return replace(
            self,
            slots=self.slots[kept],
            counts=self.counts[kept],
            first=self.first[kept],
            tokens=tokens,
            forced=forced,
        )

    def queries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each draft token: its place in `slots`, its place in the slot from 0 on, its query in the plan; int [G]."""
        index = np.repeat(np.arange(len(self.slots)), self.counts)
        place = np.arange(len(index)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        return index, place, self.first[index] + 1 + place

    def by_slot(self) -> dict[int, list[int]]:
        """The draft tokens of each slot that the host knows."""
        if self.tokens is None:
            return {}
        return {
            slot: tokens[:count].tolist()
            for slot, count, tokens in zip(self.slots.tolist(), self.counts.tolist(), self.tokens)
        }

    def fed(self, fed: np.ndarray | None) -> np.ndarray:
        """int32 [R, K], the draft tokens: those at hand, or of the device, which says what it fed each query with, [S]."""
        if fed is None:
            assert self.tokens is not None
            return self.tokens
        tokens = np.zeros((len(self.slots), int(self.counts.max(initial=0))), np.int32)
        index, place, query = self.queries()
        tokens[index, place] = fed[query]
        return tokens


@dataclass(frozen=True, slots=True)
class Verification:
    """Which draft tokens of R slots were accepted, and the tokens that the slots get; arrays [R], int32 unless said."""

    slots: np.ndarray
    counts: np.ndarray  # draft tokens verified
    accepted: np.ndarray  # leading ones that were accepted
    tokens: np.ndarray  # [R, K + 1], new tokens of the slot, of which `lengths` count
    lengths: np.ndarray  # at least 1
    stopped: np.ndarray  # bool, whether the last of them is a stop id


def as_queries(columns: Columns, draft_tokens: DraftTokens) -> tuple[Columns, ScheduledDrafts | None]:
    """Give each draft token a query of its own.

    columns: of a plan, (slots, epochs, starts, counts, sampled) [N], whose counts include draft tokens -> columns of a
    query each, and where the draft tokens are.

    `draft_tokens` of slots that are not in the plan are left out; None: that is all of them.
    """
    slots, epochs, starts, counts, sampled = columns
    index_of = np.full(max(slots.max(), draft_tokens.slots.max()) + 1, -1)
    index_of[draft_tokens.slots] = np.arange(len(draft_tokens.slots))
    of = index_of[slots]
    drafting = of >= 0
    if not drafting.any():
        return columns, None
    repeats = np.where(drafting, draft_tokens.counts[of] + 1, 1)
    begin = np.cumsum(repeats) - repeats
    index = np.repeat(np.arange(len(slots)), repeats)
    within = np.arange(len(index)) - begin[index]
    split = (
        slots[index],
        epochs[index],
        (starts[index] + within).astype(np.int32),
        np.where(drafting, 1, counts)[index].astype(np.int32),
        sampled[index],
    )
    of = of[drafting]
    tokens = draft_tokens.tokens if draft_tokens.tokens is None else draft_tokens.tokens[of]
    forced = draft_tokens.forced if draft_tokens.forced is None else draft_tokens.forced[of]
    return split, ScheduledDrafts(
        slots[drafting], draft_tokens.counts[of], begin[drafting].astype(np.int32), ~drafting[index], tokens, forced
    )


def verify(
    drafts: ScheduledDrafts,
    sampled: np.ndarray,
    draft_tokens: np.ndarray,
    known: np.ndarray,
    max_len: np.ndarray,
    min_len: np.ndarray,
    stop_ids: np.ndarray,
) -> Verification:
    """Compare `draft_tokens` [R, K] with the ids `sampled` [S] by the plan's queries.

    known, max_len, min_len [R] and stop_ids [R, n] as in `runtime.scheduler.input_batch`, `known` before this step.
    Tokens end at max_len and at the first stop id past min_len that is not also the last token allowed.
    """
    counts = drafts.counts
    at = np.arange(draft_tokens.shape[1] + 1)
    inside = at <= counts[:, None]
    tokens = sampled[np.where(inside, drafts.first[:, None] + at, drafts.first[:, None])]
    matches = (tokens[:, :-1] == draft_tokens) & inside[:, 1:]
    accepted = np.logical_and.accumulate(matches, axis=1).sum(axis=1)
    lengths = np.minimum(accepted + 1, max_len - known)
    after = known[:, None] + at + 1
    stops = (tokens[:, :, None] == stop_ids[:, None]).any(axis=2) & (after > min_len[:, None])
    stops &= (after < max_len[:, None]) & (at < lengths[:, None])
    stopped = stops.any(axis=1)
    lengths = np.where(stopped, stops.argmax(axis=1) + 1, lengths)
    accepted, lengths = np.minimum(accepted, lengths).astype(np.int32), lengths.astype(np.int32)
    return Verification(drafts.slots, counts, accepted, tokens.astype(np.int32), lengths, stopped)
