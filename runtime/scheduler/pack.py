"""Packs a plan into the flat arrays of a step. Knows no pool and no device.

Pack a plan before the next one is scheduled: tokens and blocks are read from the slots as they stand.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pagegraph.compiler.step.inputs import SamplingInput, StepInput
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.prompt_results import prompt_input
from pagegraph.runtime.scheduler.sequence import Sequence


class Packer:
    """Packs plan after plan, in order; what a plan shares with the one before is kept."""

    def __init__(self, batch: InputBatch) -> None:
        self.batch = batch
        self._decode = np.zeros(0, np.int32), np.zeros(1, np.int32)  # ids and query_start of a token a sequence
        self._epochs = np.zeros(0, np.int64)
        self._same = SamplingInput(np.zeros(0, np.float32), np.zeros(0, np.int64))
        self._special = self._has_grammar = self._reads_prompt = False
        self._min_len = np.zeros(0, np.int32)

    def pack(self, plan: Plan) -> StepInput:
        """A StepInput of the plan's T tokens and S sequences, in the plan's order.

        A token sampled by a step that is still running is unknown to the host: its id is -1; the device's own
        draft token j, counted from 0, has -2 - j.
        """
        token_ids, query_start = self._tokens(plan)
        sampling = self._sampling(plan)
        return StepInput(
            token_ids=token_ids,
            slots=plan.slots,
            query_start=query_start,
            starts=plan.starts,
            # The last token of a slot with draft tokens is known once they are verified, not from one query's sample.
            sampled=plan.sampled if plan.drafts is None else plan.sampled & plan.drafts.others,
            new_blocks=self.batch.take_new_blocks(),
            sampling=sampling,
            cached=_cached(plan),
            state_copies=plan.state_copies,
            prompt=prompt_input(self.batch, plan, query_start) if self._reads_prompt else None,
        )

    def _tokens(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [T], query_start int32 [S + 1])."""
        batch, at, starts = self.batch, plan.slots, plan.starts
        if plan.drafts is None and (plan.counts == 1).all() and (starts >= batch.known[at]).all():
            if len(self._decode[0]) != len(plan):
                self._decode = np.full(len(plan), -1, np.int32), np.arange(len(plan) + 1, dtype=np.int32)
            return self._decode
        query_start = np.zeros(len(plan) + 1, np.int32)
        np.cumsum(plan.counts, out=query_start[1:])
        index = np.repeat(np.arange(len(plan)), plan.counts)
        owners = at[index]
        positions = np.arange(query_start[-1], dtype=np.int32) + (starts - query_start[:-1])[index]
        ids = np.where(positions < batch.known[owners], batch.tokens[owners, positions], np.int32(-1))
        if (drafts := plan.drafts) is not None:
            slot, place, query = drafts.queries()
            ids[query_start[query]] = -2 - place if drafts.tokens is None else drafts.tokens[slot, place]
        return ids, query_start

    def _sampling(self, plan: Plan) -> SamplingInput:
        batch, at = self.batch, plan.slots
        if not np.array_equal(plan.epochs, self._epochs):
            self._epochs = plan.epochs
            self._same = batch.sampling.of(at)
            self._special = bool(batch.sampling.has_extras[at].any())
            self._has_grammar = bool(batch.sampling.has_grammar[at].any())
            self._reads_prompt = bool(batch.reads_prompt[at].any())
            self._min_len = batch.min_len[at]
        # Within min_tokens the ids that would stop the sequence are masked.
        young = plan.starts + plan.counts < self._min_len
        resets = [_counts(sequence) for sequence in plan.started if sequence.has_penalties]
        if not (self._special or self._has_grammar or resets or young.any()):
            return self._same
        extras = [
            (int(i), batch.sequences[at[i]])
            for i in np.flatnonzero(plan.sampled & (batch.sampling.has_extras[at] | young))
        ]
        return replace(
            self._same,
            penalty_reset=resets,
            bias=_bias(extras, young),
            allowed={index: s.logit_rules.allowed_ids for index, s in extras if s.logit_rules.allowed_ids is not None},
            masked=self._masked(plan) if self._has_grammar else None,
            num_logprobs=max((s.params.logprobs for _, s in extras if s.params.logprobs is not None), default=-1),
        )

    def _masked(self, plan: Plan) -> np.ndarray | None:
        """Queries whose sample a grammar restricts, those of draft tokens among them."""
        rows = np.flatnonzero(plan.sampled & self.batch.sampling.has_grammar[plan.slots])
        return rows.astype(np.int32) if len(rows) else None


def _cached(plan: Plan) -> list[tuple[int, np.ndarray]]:
    """What those that start in the step have in the cache; they are its last queries.

    Views of the sequences' tokens: only a device that proposes draft tokens copies them.
    """
    if not plan.started:
        return []
    begun = zip(plan.started, plan.starts[-len(plan.started) :].tolist())
    return [(sequence.slot, sequence.tokens[:start]) for sequence, start in begun if start]


def _bias(extras: list[tuple[int, Sequence]], young: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """`SamplingInput.bias` of logit_bias and of min_tokens' masks."""
    indices, tokens, values = [], [], []
    for index, sequence in extras:
        indices.append(np.full(len(sequence.logit_rules.bias_ids), index, np.int32))
        tokens.append(sequence.logit_rules.bias_ids)
        values.append(sequence.logit_rules.bias_values)
        if young[index]:
            indices.append(np.full(len(sequence.stop_ids), index, np.int32))
            tokens.append(np.fromiter(sequence.stop_ids, np.int32))
            values.append(np.full(len(sequence.stop_ids), -np.inf, np.float32))
    if not sum(map(len, indices)):
        return None
    return np.concatenate(indices), np.concatenate(tokens), np.concatenate(values)


def _counts(sequence: Sequence) -> tuple[int, np.ndarray, np.ndarray]:
    """The sequence has just entered its slot, so its own tokens are up to date."""
    return sequence.slot, sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]
