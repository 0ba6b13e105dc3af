"""What requests ask of their prompts' tokens: which hidden states of a step they need, and what comes of them.

Log-probabilities are told as they come, chunk by chunk, each once: after a preemption only those that are still owed are
computed. A sequence without output (max_tokens 0) ends with the last of its prompt. Knows no device and no sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagegraph.compiler.step.inputs import PromptInput, PromptOutput, StepLogprobs
from pagegraph.runtime.ipc.protocol import PromptLogprobs, TokenDelta
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.sequence import Sequence

MAX_ROWS = 1 << 15  # of prompt log-probabilities in one message, which then is of 6 MB at most


@dataclass(slots=True)
class PromptResult:
    """What a step brought of one sequence's prompt."""

    sequence: Sequence
    num_told: int  # with this step's
    deltas: list[TokenDelta]
    ends: bool  # the sequence wants nothing else

    def commit(self) -> None:
        """Note it in the sequence."""
        assert self.sequence.prompt is not None
        self.sequence.prompt.num_told = self.num_told
        if self.ends:
            self.sequence.finish_reason = "length"


def prompt_input(batch: InputBatch, plan: Plan, query_start: np.ndarray) -> PromptInput | None:
    """What the step is to bring back of prompts; None if no sequence in it is in a prompt of which something is asked."""
    asking = batch.reads_prompt[plan.slots] & (plan.starts < batch.num_prompt[plan.slots])
    queries = np.flatnonzero(asking).astype(np.int32)
    if not len(queries):
        return None
    rows, targets, counts, most = [], [], [], 0
    for query in queries.tolist():
        sequence, start = batch.sequences[plan.slots[query]], int(plan.starts[query])
        end = min(
            start + int(plan.counts[query]), sequence.num_prompt - 1
        )  # nothing of the prompt follows its last token
        first = min(max(start, sequence.prompt.num_told), end)
        rows.append(np.arange(first, end, dtype=np.int32) + (query_start[query] - start))
        targets.append(batch.tokens[sequence.slot, first + 1 : end + 1].copy())
        counts.append(end - first)
        most = max(most, sequence.prompt.num_logprobs)
    none = np.zeros(0, np.int32)
    return PromptInput(
        queries, np.concatenate(rows), np.concatenate(targets), np.array(counts, np.int32), most, none,
        np.zeros(len(queries), np.int32),
    )  # fmt: skip


def prompt_results(batch: InputBatch, plan: Plan, output: PromptOutput) -> list[PromptResult]:
    """What `output` means to those sequences that are still the plan's; changes nothing."""
    results, row = [], 0
    for query, count in zip(output.asked.queries.tolist(), output.asked.num_rows.tolist()):
        begin, row = row, row + count
        slot = plan.slots[query]
        if batch.epoch[slot] == plan.epochs[query]:
            end = int(plan.starts[query] + plan.counts[query])
            results.append(_result(batch.sequences[slot], end, output.logprobs, range(begin, row)))
    return results


def _result(sequence: Sequence, end: int, logprobs: StepLogprobs | None, rows: range) -> PromptResult:
    """Of the sequence whose tokens up to `end` are computed; `rows` are its own, the last of them the newest."""
    assert sequence.prompt is not None
    newest = min(end, sequence.num_prompt - 1)  # the position of the token that the last row is followed by
    first = newest - len(rows) + 1
    rows = rows[max(sequence.prompt.num_told + 1 - first, 0) :]
    deltas = []
    for some in (rows[at : at + MAX_ROWS] for at in range(0, len(rows), MAX_ROWS)):
        assert logprobs is not None
        told = _told(newest - (rows.stop - some.start) + 1, logprobs, slice(some.start, some.stop), sequence)
        deltas.append(TokenDelta(sequence.request_id, [], prompt_logprobs=told))
    ends = end >= sequence.num_prompt and sequence.max_len == sequence.num_prompt
    if ends:
        deltas.append(TokenDelta(sequence.request_id, [], "length", cached_tokens=sequence.cached_tokens))
    return PromptResult(
        sequence, max(newest, sequence.prompt.num_told) if rows else sequence.prompt.num_told, deltas, ends
    )


def _told(first: int, logprobs: StepLogprobs, rows: slice, sequence: Sequence) -> PromptLogprobs:
    """Rows of a step's log-probabilities, of the prompt tokens from position `first` on."""
    assert sequence.prompt is not None
    wanted = sequence.prompt.num_logprobs
    columns = logprobs.chosen, logprobs.ranks, logprobs.top_ids[:, :wanted], logprobs.top_values[:, :wanted]
    return PromptLogprobs(first, *(np.ascontiguousarray(column[rows]).tobytes() for column in columns))
