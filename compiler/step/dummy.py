"""Steps that touch the dummy slot and the null block only: to compile, warm up and measure on, beside whatever runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagegraph.compiler.step.inputs import Filters, Penalties, PromptInput, SamplingInput, StepInput

LOGPROBS = 20


def dummy_step(
    lengths: Sequence[int], dummy_slot: int, sampling: SamplingInput | None = None, prompt: PromptInput | None = None
) -> StepInput:
    """A step of prompts of these lengths, greedy unless `sampling` says otherwise."""
    seqs = len(lengths)
    greedy = SamplingInput(temperature=np.zeros(seqs, np.float32), seeds=np.zeros(seqs, np.int64))
    return StepInput(
        token_ids=np.zeros(sum(lengths), np.int32),
        slots=np.full(seqs, dummy_slot, np.int32),
        query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        starts=np.zeros(seqs, np.int32),
        sampled=np.zeros(seqs, bool),
        new_blocks=np.zeros((0, 3), np.int32),
        sampling=sampling or greedy,
        prompt=prompt,
    )


def read_whole(lengths: Sequence[int]) -> PromptInput:
    """All that can be asked of prompts of these lengths."""
    counts, tokens = np.array(lengths, np.int32), np.arange(sum(lengths), dtype=np.int32)
    queries = np.arange(len(lengths), dtype=np.int32)
    return PromptInput(queries, tokens, np.zeros_like(tokens), counts, LOGPROBS, tokens, counts)


def masked(seqs: int) -> SamplingInput:
    """Sampling of `seqs` sequences that ask for masks alone."""
    ids = np.arange(seqs, dtype=np.int32)
    return SamplingInput(np.zeros(seqs, np.float32), np.zeros(seqs, np.int64), masked=ids)


def everything(seqs: int) -> SamplingInput:
    """Sampling of `seqs` sequences that ask for all there is."""
    full = lambda value: np.full(seqs, value, np.float32)  # noqa: E731
    ids = np.arange(seqs, dtype=np.int32)
    return SamplingInput(
        temperature=full(1),
        seeds=np.zeros(seqs, np.int64),
        filters=Filters(np.full(seqs, 5, np.int32), full(0.5), full(0.1)),
        penalties=Penalties(full(1.5), full(0.5), full(0.5)),
        bias=(ids, np.zeros_like(ids), full(1)),
        allowed={0: ids[:1]},
        masked=ids,
        num_logprobs=LOGPROBS,
    )
