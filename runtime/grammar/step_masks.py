"""The grammars of a step's sequences: they take the tokens that it brought and say which may come next.

Masks of all sequences are computed at once by llguidance's threads, without Python's lock, while the device computes
the logits that they are for. What a grammar raises, or runs out of, is told of its own sequence: nothing here raises.
Knows slots and plans; knows no step and no device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence as Rows
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pagegraph.runtime.grammar.compiler import GrammarCompiler
from pagegraph.runtime.grammar.matcher import TokenMatcher
from pagegraph.runtime.scheduler.commit import StepResult, end, take_back_end
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.structured_output import in_words

if TYPE_CHECKING:
    from llguidance import LLExecutor

log = logging.getLogger("pagegraph.engine")

MAX_THREADS = 8


class Refused(NamedTuple):
    """A sequence that cannot go on, with the HTTP status of that."""

    sequence: Sequence
    status: int
    reason: str


class _Place(NamedTuple):
    """A sequence whose next token is masked, and draft tokens' behind it, at `index` of the masks and the next."""

    sequence: Sequence
    matcher: TokenMatcher
    index: int
    drafts: list[int]


class StepMasks:
    """Of the sequences in `batch`."""

    def __init__(self, batch: InputBatch, compiler: GrammarCompiler, eos_ids: frozenset[int]) -> None:
        self._batch = batch
        self._compiler = compiler
        self._eos_ids = np.array(sorted(eos_ids), np.int64)

    def advance(self, result: StepResult) -> list[Refused]:
        """Take a committed step's tokens; those whose text can only end end with it -> who cannot go on."""
        masked = np.flatnonzero(self._batch.sampling.has_grammar[result.slots])
        if not len(masked):
            return []
        going: list[tuple[int, Sequence, TokenMatcher, list[int]]] = []
        for index in masked.tolist():
            sequence, delta = self._batch.sequences[result.slots[index]], result.deltas.get(index)
            tokens = [int(result.token_ids[index])] if delta is None else delta.token_ids
            going.append((index, sequence, sequence.grammar, tokens))
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

        Everything before the plan is committed. Rows of sequences that are gone are left alone.
        """
        places = self._places(plan, rows)
        wide = np.full((len(rows), self._words), -1, np.int32) if masks.shape[1] != self._words else masks
        refused = self._compute(places, wide)
        for place in places:
            if place.sequence.params.ignore_eos:
                self._forbid_end(wide[place.index : place.index + len(place.drafts) + 1])
        if wide is not masks:
            masks[:] = wide[:, : masks.shape[1]]
        return refused

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(min(max((os.cpu_count() or 1) // 2, 1), MAX_THREADS))

    @cached_property
    def _words(self) -> int:
        return -(-self._compiler.vocabulary().vocab_size // 32)

    def _take(self, going: Rows[tuple[Sequence, TokenMatcher, list[int]]]) -> list[tuple[int, str] | None]:
        """Of each: None if its grammar has the tokens, else status and reason."""
        singles = [(matcher.matcher, tokens[0]) for _, matcher, tokens in going if len(tokens) == 1]
        try:
            good = iter(self._executor.consume_token_par(singles) if singles else [])
            taken = [next(good) if len(tokens) == 1 else matcher.take(tokens) for _, matcher, tokens in going]
            for _, matcher, tokens in going:
                matcher.num_tokens += len(tokens) == 1
        except Exception:
            return [self._replayed(sequence, matcher) for sequence, matcher, _ in going]
        return [None if ok else _unmatched(sequence) for ok, (sequence, _, _) in zip(taken, going, strict=True)]

    def _replayed(self, sequence: Sequence, matcher: TokenMatcher) -> tuple[int, str] | None:
        """Take all tokens of the sequence anew -> as `_take`."""
        slot = sequence.slot
        try:
            tokens = self._batch.tokens[slot, sequence.num_prompt : self._batch.known[slot]].tolist()
            return None if matcher.replay(tokens) else _unmatched(sequence)
        except Exception:
            return _raised()

    def _places(self, plan: Plan, rows: np.ndarray) -> list[_Place]:
        at = plan.slots[rows]
        alive = self._batch.epoch[at] == plan.epochs[rows]
        first = np.append(True, at[1:] != at[:-1])  # the queries of a slot stand together
        drafts = {} if plan.drafts is None else plan.drafts.by_slot()
        places = []
        for index in np.flatnonzero(alive & first).tolist():
            sequence = self._batch.sequences[at[index]]
            places.append(_Place(sequence, sequence.grammar, index, drafts.get(int(at[index]), [])))
        return places

    def _compute(self, places: list[_Place], masks: np.ndarray) -> list[Refused]:
        """Masks by all threads; if that raises, one by one, and it is known who is to blame."""
        refused = []
        for place in list(places):
            known = self._batch.known[place.sequence.slot] - place.sequence.num_prompt
            if place.matcher.num_tokens != known and (reason := self._replayed(place.sequence, place.matcher)):
                refused.append(Refused(place.sequence, *reason))
                places.remove(place)
        try:
            self._compute_all(places, masks)
        except Exception:
            for place in places:
                try:
                    if reason := self._replayed(place.sequence, place.matcher):
                        refused.append(Refused(place.sequence, *reason))
                    else:
                        self._compute_all([place], masks)
                except Exception:
                    refused.append(Refused(place.sequence, *_raised()))
        for place in places:
            if place.matcher.matcher.is_error():
                self._compiler.forget(place.matcher.grammar)
                problem = in_words(place.matcher.matcher.get_error())
                refused.append(Refused(place.sequence, 400, f"structured_outputs cannot be served on: {problem}"))
                masks[place.index : place.index + len(place.drafts) + 1] = -1
        return refused

    def _compute_all(self, places: list[_Place], masks: np.ndarray) -> None:
        sizes = masks.ctypes.data, masks.shape[1] * 4, len(masks)
        plain = [(place.matcher.matcher, place.index) for place in places if not place.drafts]
        drafting = [(place.matcher.matcher, place.index, place.drafts) for place in places if place.drafts]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *sizes)
        if drafting:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafting, *sizes)

    def _holds_its_end(self, sequence: Sequence, matcher: TokenMatcher) -> bool:
        """Whether the text can only end, for one that must not sample the token that says so."""
        young = self._batch.known[sequence.slot] < self._batch.min_len[sequence.slot]
        if not (sequence.params.ignore_eos or young) or not matcher.matcher.is_accepting():
            return False
        mask = np.full((1, self._words), -1, np.int32)
        self._compute([_Place(sequence, matcher, 0, [])], mask)
        self._forbid_end(mask)
        return not mask.any()

    def _forbid_end(self, masks: np.ndarray) -> None:
        """Clear the bits of EOS in int32 [n, words]."""
        for token in self._eos_ids.tolist():
            masks[:, token // 32] &= np.int32(~np.uint32(1 << token % 32).view(np.int32))


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
