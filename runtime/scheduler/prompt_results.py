"""What requests ask of their prompts' tokens: which hidden states of a step they need, and what comes of them.

Log-probabilities are told as they come, chunk by chunk, each once: after a preemption only those that are still owed are
computed. Hidden states are summed over the chunks of a prompt, from its first on. A sequence without output (max_tokens 0)
ends with the last of its prompt. Knows no device and no sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagegraph.compiler.step.inputs import PromptInput, PromptOutput, StepLogprobs
from pagegraph.runtime.ipc.protocol import PromptLogprobs, TokenDelta
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.sequence import Sequence

MAX_ROWS = 1 << 15  # of prompt log-probabilities in one message, which then is of 6 MB at most


@dataclass(slots=True)
class PromptResult:
    """What a step brought of one sequence's prompt."""

    sequence: Sequence
    num_told: int  # with this step's
    total: np.ndarray | None  # with this step's
    deltas: list[TokenDelta]
    finish_reason: str  # "" where it goes on

    def commit(self) -> None:
        """Note it in the sequence."""
        assert self.sequence.prompt is not None
        self.sequence.prompt.num_told, self.sequence.prompt.total = self.num_told, self.total
        if self.finish_reason:
            self.sequence.finish_reason = self.finish_reason


def prompt_input(batch: InputBatch, plan: Plan, query_start: np.ndarray) -> PromptInput | None:
    """What the step is to bring back of prompts; None if no sequence in it is in a prompt of which something is asked."""
    asking = batch.reads_prompt[plan.slots] & (plan.starts < batch.num_prompt[plan.slots])
    queries = np.flatnonzero(asking).astype(np.int32)
    if not len(queries):
        return None
    rows, targets, summed, most = [], [], [], 0
    for query in queries.tolist():
        sequence, start = batch.sequences[plan.slots[query]], int(plan.starts[query])
        reads, end, shift = sequence.prompt, start + int(plan.counts[query]), int(query_start[query]) - start
        owed = reads.owed(start, end, sequence.num_prompt)
        rows.append(np.arange(owed.start, owed.stop, dtype=np.int32) + shift)
        targets.append(batch.tokens[sequence.slot, owed.start + 1 : owed.stop + 1].copy())
        most = max(most, reads.num_logprobs or 0)
        pooled = reads.pooled(start, end, sequence.num_prompt)
        summed.append(np.arange(pooled.start, pooled.stop, dtype=np.int32) + shift)
    sizes = [np.array([*map(len, one)], np.int32) for one in (rows, summed)]
    return PromptInput(
        queries, np.concatenate(rows), np.concatenate(targets), sizes[0], most, np.concatenate(summed), sizes[1]
    )  # fmt: skip


def prompt_results(batch: InputBatch, plan: Plan, output: PromptOutput) -> list[PromptResult]:
    """What `output` means to those sequences that are still the plan's; changes nothing."""
    results, row, asked = [], 0, output.asked
    for at, (query, count) in enumerate(zip(asked.queries.tolist(), asked.num_rows.tolist())):
        begin, row = row, row + count
        slot = plan.slots[query]
        if batch.epoch[slot] == plan.epochs[query]:
            chunk = range(int(plan.starts[query]), int(plan.starts[query] + plan.counts[query]))
            total = None if output.sums is None or not asked.num_summed[at] else output.sums[at]
            results.append(_result(batch.sequences[slot], chunk, output.logprobs, range(begin, row), total))
    return results


def _result(
    sequence: Sequence, chunk: range, logprobs: StepLogprobs | None, rows: range, total: np.ndarray | None
) -> PromptResult:
    """Of the sequence of which a chunk was computed; `rows` and `total` are its own, the last row the newest."""
    reads = sequence.prompt
    assert reads is not None
    newest = min(chunk.stop, sequence.num_prompt - 1)  # the position of the token that the last row is followed by
    told = max(newest, reads.num_told) if rows else reads.num_told
    rows = rows[max(reads.num_told + 1 - (newest - len(rows) + 1), 0) :]
    deltas = []
    for some in (rows[at : at + MAX_ROWS] for at in range(0, len(rows), MAX_ROWS)):
        assert logprobs is not None
        part = _told(newest - (rows.stop - some.start) + 1, logprobs, slice(some.start, some.stop), sequence)
        deltas.append(TokenDelta(sequence.request_id, [], prompt_logprobs=part))
    if chunk.start and reads.total is not None:
        total = reads.total if total is None else reads.total + total
    reason, embedding = "", b""
    if chunk.stop >= sequence.num_prompt and sequence.max_len == sequence.num_prompt:
        reason = "length"
        if sequence.params.pooling is not None:
            assert reads.pooler is not None and total is not None
            reason, embedding = "stop", _embedding(reads.pooler, total, sequence).tobytes()
        cached, miss = sequence.cached_tokens, sequence.cache_miss
        deltas.append(
            TokenDelta(sequence.request_id, [], reason, cached_tokens=cached, embedding=embedding, cache_miss=miss)
        )
    return PromptResult(sequence, told, total, deltas, reason)


def _embedding(pooler: Pooler, total: np.ndarray, sequence: Sequence) -> np.ndarray:
    """The embedding, float32, of the sum of the hidden states that are pooled."""
    assert sequence.params.pooling is not None
    vector = total / sequence.num_prompt if pooler.pooling == "mean" else total
    vector = vector[: sequence.params.pooling.dimensions]
    length = float(np.linalg.norm(vector)) if pooler.normalize else 1.0
    return np.asarray(vector / length if length > 0 else vector, np.float32)


def _told(first: int, logprobs: StepLogprobs, rows: slice, sequence: Sequence) -> PromptLogprobs:
    """Rows of a step's log-probabilities, of the prompt tokens from position `first` on."""
    assert sequence.prompt is not None
    wanted = sequence.prompt.num_logprobs or 0
    columns = logprobs.chosen, logprobs.ranks, logprobs.top_ids[:, :wanted], logprobs.top_values[:, :wanted]
    return PromptLogprobs(first, *(np.ascontiguousarray(column[rows]).tobytes() for column in columns))
