"""The grammars of a step's sequences: they take the tokens that it brought and say which may come next.

Masks of all sequences are computed at once by llguidance's threads, without Python's lock, while the device computes
the logits that they are for. What a grammar raises, or runs out of, is told of its own sequence: nothing here raises.
Knows slots and plans; knows no step and no device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pagegraph.runtime.grammar.compiler import GrammarCompiler
from pagegraph.runtime.grammar.matcher import TokenMatcher
from pagegraph.runtime.grammar.workers import GrammarWorkers, is_too_dear
from pagegraph.runtime.scheduler.commit import StepResult, end, take_back_end
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.structured_output import in_words

log = logging.getLogger("pagegraph.engine")

_FORBIDS = "satisfy the grammar"  # in the error of a matcher that was given a token that its grammar does not have


class Refused(NamedTuple):
    """A sequence that cannot go on, with the HTTP status of that."""

    sequence: Sequence
    status: int
    reason: str


class _Place(NamedTuple):
    """A sequence whose next token is masked, and draft tokens' behind it, at `index` of the masks and the next."""

    sequence: Sequence
    matcher: TokenMatcher
    num_known: int  # tokens of the sequence, the prompt's included, that come before it
    index: int
    drafts: list[int]

    @property
    def rows(self) -> range:
        """Of the masks."""
        return range(self.index, self.index + len(self.drafts) + 1)


class StepMasks:
    """Of the sequences in `batch`."""

    def __init__(self, batch: InputBatch, compiler: GrammarCompiler, eos_ids: frozenset[int]) -> None:
        self._batch = batch
        self._compiler = compiler
        self._eos_ids = np.array(sorted(eos_ids), np.int64)
        self._workers = GrammarWorkers()

    def advance(self, result: StepResult) -> list[Refused]:
        """Take a committed step's tokens; those whose text can only end end with it -> who cannot go on."""
        masked = np.flatnonzero(self._batch.sampling.has_grammar[result.slots])
        if not len(masked):
            return []
        going: list[tuple[int, Sequence, TokenMatcher, list[int]]] = []
        slots, sampled = result.slots[masked].tolist(), result.token_ids[masked].tolist()
        for index, slot, token in zip(masked.tolist(), slots, sampled):
            sequence, delta = self._batch.sequences[slot], result.deltas.get(index)
            going.append((index, sequence, sequence.grammar, [token] if delta is None else delta.token_ids))
        refused = []
        taken = self._take([(sequence, matcher, tokens) for _, sequence, matcher, tokens in going])
        for (index, sequence, matcher, _), reason in zip(going, taken, strict=True):
            if reason:
                refused.append(Refused(sequence, *reason))
                if sequence.finish_reason:
                    take_back_end(result, index, sequence)
            elif not sequence.finish_reason and (matcher.can_only_end or self._holds_its_end(sequence, matcher)):
                end(result, index, sequence)
        return refused

    def fill(self, plan: Plan, rows: np.ndarray, masks: np.ndarray) -> list[Refused]:
        """Write the masks of the plan's queries `rows` [R] into int32 [R, words] -> who cannot go on.

        Everything before the plan is committed. Rows of sequences that are gone, or cannot go on, allow all.
        """
        alive = self._batch.epoch[plan.slots[rows]] == plan.epochs[rows]
        places = self._places(plan, rows, alive)
        wide = np.empty((len(rows), self._words), np.int32) if masks.shape[1] != self._words else masks
        if not alive.all():
            wide[~alive] = -1
        refused = self._compute(places, wide)
        self._cut_numbers(places, plan.slots[rows], wide)
        endless = [row for place in places if place.sequence.params.ignore_eos for row in place.rows]
        if endless:
            self._forbid_end(wide, endless)
        if wide is not masks:
            masks[:] = wide[:, : masks.shape[1]]
        return refused

    @cached_property
    def _words(self) -> int:
        return -(-self._compiler.vocabulary().vocab_size // 32)

    def _take(self, going: Rows[tuple[Sequence, TokenMatcher, list[int]]]) -> list[tuple[int, str] | None]:
        """Of each: None if its grammar has the tokens, else status and reason."""
        try:
            taken = self._workers.consume([(matcher, tokens) for _, matcher, tokens in going])
        except Exception:
            return [self._replayed(sequence, matcher) for sequence, matcher, _ in going]
        return [
            None if ok else _refused(sequence, matcher) for ok, (sequence, matcher, _) in zip(taken, going, strict=True)
        ]

    def _replayed(self, sequence: Sequence, matcher: TokenMatcher) -> tuple[int, str] | None:
        """Take all tokens of the sequence anew -> as `_take`."""
        slot = sequence.slot
        try:
            tokens = self._batch.tokens[slot, sequence.num_prompt : self._batch.known[slot]].tolist()
            return None if matcher.replay(tokens) else _refused(sequence, matcher)
        except Exception:
            return _raised()

    def _places(self, plan: Plan, rows: np.ndarray, alive: np.ndarray) -> list[_Place]:
        at = plan.slots[rows]
        first = np.append(True, at[1:] != at[:-1])  # the queries of a slot stand together
        indices = np.flatnonzero(alive & first)
        slots = at[indices]
        drafts = {} if plan.drafts is None else plan.drafts.by_slot()
        places = []
        for index, slot, known in zip(indices.tolist(), slots.tolist(), self._batch.known[slots].tolist()):
            sequence = self._batch.sequences[slot]
            places.append(_Place(sequence, sequence.grammar, known, index, drafts.get(slot, [])))
        return places

    def _compute(self, places: list[_Place], masks: np.ndarray) -> list[Refused]:
        """Masks of all; if that raises, one by one, and it is known who is to blame."""
        refused: list[tuple[_Place, tuple[int, str]]] = []
        for place in list(places):
            behind = place.matcher.num_tokens != place.num_known - place.sequence.num_prompt
            if behind and (reason := self._replayed(place.sequence, place.matcher)):
                refused.append((place, reason))
                places.remove(place)
        try:
            self._compute_all(places, masks)
        except Exception:
            for place in places:
                try:
                    if reason := self._replayed(place.sequence, place.matcher):
                        refused.append((place, reason))
                    else:
                        self._compute_all([place], masks)
                except Exception:
                    refused.append((place, _raised()))
        known = {place.index for place, _ in refused}
        for place in places:
            if place.index not in known and (place.matcher.matcher.is_error() or is_too_dear(place.matcher)):
                self._compiler.forget(place.matcher.grammar)
                refused.append((place, _over_limits(place.matcher)))
        for place, _ in refused:
            masks[place.rows] = -1
        return [Refused(place.sequence, *reason) for place, reason in refused]

    def _compute_all(self, places: list[_Place], masks: np.ndarray) -> None:
        self._workers.compute([(place.matcher, place.index, place.drafts) for place in places], masks)

    def _cut_numbers(self, places: list[_Place], slots: np.ndarray, masks: np.ndarray) -> None:
        """Let numbers end that have many digits. slots: of each mask, also of sequences that are gone."""
        if (numbers := self._compiler.numbers) is None:
            return
        batch = self._batch
        may_be_long = numbers.end_with_digits(batch.tokens[slots, batch.known[slots] - 1])
        if not may_be_long.any() and len(places) == len(slots):  # without draft tokens
            return
        for place in places:
            slot, rows = place.sequence.slot, place.rows
            if place.matcher.grammar.has_json and (place.drafts or may_be_long[place.index]):
                said = batch.tokens[slot, place.sequence.num_prompt : batch.known[slot]]
                numbers.cut(said, place.drafts, masks[rows.start : rows.stop])

    def _holds_its_end(self, sequence: Sequence, matcher: TokenMatcher) -> bool:
        """Whether the text can only end, for one that must not sample the token that says so."""
        if not matcher.matcher.is_accepting():
            return False
        known = int(self._batch.known[sequence.slot])
        if not (sequence.params.ignore_eos or known < self._batch.min_len[sequence.slot]):
            return False
        mask = np.empty((1, self._words), np.int32)
        self._compute([_Place(sequence, matcher, known, 0, [])], mask)
        self._forbid_end(mask, [0])
        return not mask.any()

    def _forbid_end(self, masks: np.ndarray, rows: list[int]) -> None:
        """Clear the bits of EOS in these rows of int32 [n, words]."""
        for token in self._eos_ids.tolist():
            masks[rows, token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF).view(np.int32)


def _refused(sequence: Sequence, matcher: TokenMatcher) -> tuple[int, str]:
    """Status and reason where a grammar did not take a token that was sampled."""
    if matcher.matcher.is_error() and _FORBIDS not in matcher.matcher.get_error():
        return _over_limits(matcher)
    return _unmatched(sequence)


def _over_limits(matcher: TokenMatcher) -> tuple[int, str]:
    """Status and reason of a grammar that takes too much at this point of a text."""
    error = matcher.matcher.get_error()
    problem = in_words(error) if error else "its tokens take too long; make it simpler"
    return 400, f"structured_outputs cannot be served on: {problem}"


def _unmatched(sequence: Sequence) -> tuple[int, str]:
    """Status and reason where a token was sampled that the grammar does not have: no token was left to choose from."""
    params = sequence.params
    named = {"allowed_token_ids": params.allowed_token_ids, "logit_bias": params.logit_bias}
    named |= {"stop_token_ids": params.min_tokens and params.stop_token_ids}
    beside = " or ".join(name for name, value in named.items() if value)
    if not beside:
        return 500, "a token was sampled that structured_outputs forbids"
    return 400, f"structured_outputs allows no token here that {beside} allows too; leave one of them out"


def _raised() -> tuple[int, str]:
    log.exception("a grammar raised an exception")
    return 500, "structured_outputs failed for this request; the log says why"
