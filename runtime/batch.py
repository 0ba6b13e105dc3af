"""From a plan to the flat arrays of a step. Knows no pool and no device: pure packing.

Pack a plan before the next one is scheduled: tokens and pages are read from the rows as they stand.
"""

from __future__ import annotations

import numpy as np

from compiler.step_input import SamplingInput, StepInput
from runtime.request import Sequence
from runtime.rows import Rows
from runtime.scheduler import Plan


def pack(plan: Plan, rows: Rows) -> StepInput:
    """A StepInput of the plan's T tokens and S sequences, in the plan's order.

    A token sampled by a step that is still running is unknown to the host: its id is -1.
    """
    at, counts, starts = plan.rows, plan.counts, plan.starts
    ends = starts + counts
    query_start = np.zeros(len(at) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    tables = rows.blocks[at, : rows.num_blocks[at].max()]
    if query_start[-1] == len(at):  # a token of each
        owners, positions, index = at, starts, np.arange(len(at))
    else:
        index = np.repeat(np.arange(len(at)), counts)
        owners = at[index]
        positions = np.arange(query_start[-1], dtype=np.int32) + (starts - query_start[:-1])[index]
    blocks = positions // rows.block_size
    return StepInput(
        token_ids=np.where(positions < rows.known[owners], rows.tokens[owners, positions], np.int32(-1)),
        positions=positions,
        slots=rows.blocks[owners, blocks] * np.int32(rows.block_size) + positions % rows.block_size,
        rows=at,
        query_start=query_start,
        seq_lens=ends,
        block_tables=tables,
        sampled=plan.sampled,
        sampling=_sampling(plan, rows, ends),
    )


def _sampling(plan: Plan, rows: Rows, positions: np.ndarray) -> SamplingInput:
    at = plan.rows
    # Within min_tokens the ids that would stop the sequence are masked.
    young = positions < rows.min_len[at]
    extras = [(int(i), rows.sequences[at[i]]) for i in np.flatnonzero(plan.sampled & (rows.has_extras[at] | young))]
    bias_rows, bias_tokens, bias_values = _bias(extras, young)
    return SamplingInput(
        temperature=rows.temperature[at],
        top_k=rows.top_k[at],
        top_p=rows.top_p[at],
        min_p=rows.min_p[at],
        seeds=rows.seed[at],
        positions=positions,
        repetition=rows.repetition[at],
        presence=rows.presence[at],
        frequency=rows.frequency[at],
        bias_rows=bias_rows,
        bias_tokens=bias_tokens,
        bias_values=bias_values,
        allowed={index: s.allowed_ids for index, s in extras if s.allowed_ids is not None},
        num_logprobs=max((s.params.logprobs for _, s in extras if s.params.logprobs is not None), default=-1),
        penalty_reset=[_counts(sequence) for sequence in plan.started if sequence.has_penalties],
    )


def _bias(extras: list[tuple[int, Sequence]], young: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index in the plan int32, token id int32, addend float32), each [B]: logit_bias and min_tokens' masks."""
    if not extras:
        return _NO_IDS, _NO_IDS, _NO_VALUES
    rows, tokens, values = [_NO_IDS], [_NO_IDS], [_NO_VALUES]
    for index, sequence in extras:
        rows.append(np.full(len(sequence.bias_ids), index, np.int32))
        tokens.append(sequence.bias_ids)
        values.append(sequence.bias_values)
        if young[index]:
            rows.append(np.full(len(sequence.stop_ids), index, np.int32))
            tokens.append(np.fromiter(sequence.stop_ids, np.int32))
            values.append(np.full(len(sequence.stop_ids), -np.inf, np.float32))
    return np.concatenate(rows), np.concatenate(tokens), np.concatenate(values)


def _counts(sequence: Sequence) -> tuple[int, np.ndarray, np.ndarray]:
    """The sequence has just entered its row, so its own tokens are up to date."""
    return sequence.row, sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]


_NO_IDS = np.empty(0, np.int32)
_NO_VALUES = np.empty(0, np.float32)
