"""From a plan to the flat arrays of a step. Knows no pool and no device: pure packing."""

from __future__ import annotations

import numpy as np

from compiler.step_input import SamplingInput, StepInput
from runtime.request import Sequence
from runtime.scheduler import Plan


def pack(plan: Plan, block_size: int) -> StepInput:
    """A StepInput of the plan's T tokens and S sequences, in the plan's order.

    A token sampled by a step that is still running is unknown to the host: its id is -1.
    """
    counts = np.array([entry.count for entry in plan], np.int32)
    starts = np.array([entry.start for entry in plan], np.int32)
    query_start = np.zeros(len(plan) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    width = max(len(entry.sequence.blocks) for entry in plan)
    tables = np.zeros((len(plan), width), np.int32)
    token_ids = np.full(query_start[-1], -1, np.int32)
    for index, entry in enumerate(plan):
        blocks = entry.sequence.blocks
        tables[index, : len(blocks)] = blocks
        known = entry.sequence.tokens[entry.start : entry.start + entry.count]
        token_ids[query_start[index] : query_start[index] + len(known)] = known
    positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
    owners = np.repeat(np.arange(len(plan)), counts)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    return StepInput(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        rows=np.array([entry.sequence.row for entry in plan], np.int32),
        query_start=query_start,
        seq_lens=starts + counts,
        block_tables=tables,
        sampled=np.array([entry.sampled for entry in plan], bool),
        sampling=_sampling(plan, starts + counts),
    )


def _sampling(plan: Plan, positions: np.ndarray) -> SamplingInput:
    all_params = [entry.sequence.params for entry in plan]
    bias: list[tuple[int, int, float]] = []
    for index, entry in enumerate(plan):
        if entry.sampled:
            bias += [(index, token, value) for token, value in entry.sequence.params.logit_bias.items()]
            bias += [(index, token, -np.inf) for token in _forbidden(entry.sequence, entry.start + entry.count)]
    asked = [p.logprobs for p, entry in zip(all_params, plan) if p.logprobs is not None and entry.sampled]
    return SamplingInput(
        temperature=np.array([p.temperature for p in all_params], np.float32),
        top_k=np.array([p.top_k for p in all_params], np.int32),
        top_p=np.array([p.top_p for p in all_params], np.float32),
        min_p=np.array([p.min_p for p in all_params], np.float32),
        seeds=np.array([entry.sequence.seed for entry in plan], np.int64),
        positions=positions,
        repetition=np.array([p.repetition_penalty for p in all_params], np.float32),
        presence=np.array([p.presence_penalty for p in all_params], np.float32),
        frequency=np.array([p.frequency_penalty for p in all_params], np.float32),
        bias_rows=np.array([row for row, _, _ in bias], np.int32),
        bias_tokens=np.array([token for _, token, _ in bias], np.int32),
        bias_values=np.array([value for _, _, value in bias], np.float32),
        allowed={
            index: np.array(p.allowed_token_ids, np.int32)
            for index, p in enumerate(all_params)
            if p.allowed_token_ids is not None
        },
        num_logprobs=max(asked, default=-1),
        penalty_reset=[_counts(entry.sequence) for entry in plan if entry.restarts and entry.sequence.has_penalties],
    )


def _forbidden(sequence: Sequence, position: int) -> frozenset[int]:
    """Stop ids, while the token to be sampled at `position` is one of the first `min_tokens`."""
    return sequence.stop_ids if position - sequence.num_prompt < sequence.params.min_tokens else frozenset()


def _counts(sequence: Sequence) -> tuple[int, np.ndarray, np.ndarray]:
    prompt, outputs = sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]
    return sequence.row, np.array(prompt, np.int64), np.array(outputs, np.int64)
