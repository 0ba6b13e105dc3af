"""From a plan to the flat arrays of a step. Knows no pool and no device: pure packing.

Pack a plan before the next one is scheduled: pages and rows are read from the sequences as they stand.
"""

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
    ends = starts + counts
    query_start = np.zeros(len(plan) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    tables = _block_tables(plan)
    positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
    owners = np.repeat(np.arange(len(plan)), counts)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    return StepInput(
        token_ids=_token_ids(plan),
        positions=positions,
        slots=slots,
        rows=np.array([entry.sequence.row for entry in plan], np.int32),
        query_start=query_start,
        seq_lens=ends,
        block_tables=tables,
        sampled=np.array([entry.sampled for entry in plan], bool),
        sampling=_sampling(plan, ends),
    )


def _token_ids(plan: Plan) -> np.ndarray:
    ids: list[int] = []
    for entry in plan:
        tokens, start = entry.sequence.tokens, entry.start
        if entry.count == 1:
            ids.append(tokens[start] if start < len(tokens) else -1)
        else:
            ids += tokens[start : start + entry.count]  # known throughout: only a decode runs ahead of the host
    return np.array(ids, np.int32)


def _block_tables(plan: Plan) -> np.ndarray:
    tables = np.zeros((len(plan), max(len(entry.sequence.blocks) for entry in plan)), np.int32)
    for index, entry in enumerate(plan):
        blocks = entry.sequence.blocks
        tables[index, : len(blocks)] = np.frombuffer(blocks, np.int32)
    return tables


def _sampling(plan: Plan, positions: np.ndarray) -> SamplingInput:
    scalars = np.array(
        [
            (p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            for p in (entry.sequence.params for entry in plan)
        ],
        np.float64,  # holds every int32 exactly
    )
    temperature, top_k, top_p, min_p, repetition, presence, frequency = np.ascontiguousarray(scalars.T, np.float32)
    bias_rows, bias_tokens, bias_values = _bias(plan)
    sampled = [(index, entry.sequence) for index, entry in enumerate(plan) if entry.sampled]
    return SamplingInput(
        temperature=temperature,
        top_k=scalars[:, 1].astype(np.int32),
        top_p=top_p,
        min_p=min_p,
        seeds=np.array([entry.sequence.seed for entry in plan], np.int64),
        positions=positions,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        bias_rows=bias_rows,
        bias_tokens=bias_tokens,
        bias_values=bias_values,
        allowed={index: s.allowed_ids for index, s in sampled if s.allowed_ids is not None},
        num_logprobs=max((s.params.logprobs for _, s in sampled if s.params.logprobs is not None), default=-1),
        penalty_reset=[_counts(entry.sequence) for entry in plan if entry.restarts and entry.sequence.has_penalties],
    )


def _bias(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index in the plan int32, token id int32, addend float32), each [B]: logit_bias and min_tokens' masks."""
    rows, tokens, values = [_NO_IDS], [_NO_IDS], [_NO_VALUES]
    for index, entry in enumerate(plan):
        if not entry.sampled:
            continue
        sequence = entry.sequence
        if len(sequence.bias_ids):
            rows.append(np.full(len(sequence.bias_ids), index, np.int32))
            tokens.append(sequence.bias_ids)
            values.append(sequence.bias_values)
        # The sampled token is output number start + count - num_prompt, in flight ones counted.
        if sequence.stop_ids and entry.start + entry.count - sequence.num_prompt < sequence.params.min_tokens:
            rows.append(np.full(len(sequence.stop_ids), index, np.int32))
            tokens.append(np.fromiter(sequence.stop_ids, np.int32))
            values.append(np.full(len(sequence.stop_ids), -np.inf, np.float32))
    return np.concatenate(rows), np.concatenate(tokens), np.concatenate(values)


def _counts(sequence: Sequence) -> tuple[int, np.ndarray, np.ndarray]:
    tokens = np.array(sequence.tokens, np.int32)
    return sequence.row, tokens[: sequence.num_prompt], tokens[sequence.num_prompt :]


_NO_IDS = np.empty(0, np.int32)
_NO_VALUES = np.empty(0, np.float32)
