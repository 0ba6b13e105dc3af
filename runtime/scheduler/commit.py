"""Appends the tokens that a step sampled to their slots, and says which sequences end by them, and why.

Plans are committed in the order they were scheduled. Length is checked before stop ids: a stop id that is also the last
token allowed ends the sequence with "length". A token sampled past a sequence's end is dropped here; rejected draft
tokens are subtracted from the slot's counts. Knows no blocks and no queue: a sequence that ends keeps its slot for now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pagegraph.compiler.step.inputs import StepLogprobs, StepOutput
from pagegraph.runtime.ipc.protocol import TokenDelta, TokenLogprob, with_chosen
from pagegraph.runtime.scheduler.draft_tokens import Verification, verify
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.prompt_results import prompt_results
from pagegraph.runtime.scheduler.running import Running
from pagegraph.runtime.scheduler.sequence import Sequence


@dataclass(slots=True)
class StepResult:
    """token_ids[i] is the last token that the sequence in slot slots[i] got from the step; arrays [n]."""

    slots: np.ndarray  # int32
    token_ids: np.ndarray  # int32
    owners: np.ndarray  # int32
    request_ids: np.ndarray  # object: str
    deltas: dict[int, TokenDelta]  # by index, for those with more to tell than the token
    ended: list[Sequence]  # their `finish_reason` says why
    begun: list[Sequence]  # those whose first token it is
    verification: Verification | None = None  # of the step's draft tokens
    prompts: list[tuple[int, TokenDelta]] = field(default_factory=list)  # (owner, what came of a prompt): told first


def append(batch: InputBatch, running: Running, plan: Plan, output: StepOutput) -> StepResult:
    """Append what the step sampled to the slots whose sequence is still the plan's; slots with draft tokens come last.

    If it raises, nothing was changed: all that depends on a request's parameters is done first.
    """
    at, ids, index = plan.slots, output.token_ids, None
    wanted = plan.sampled & (batch.epoch[at] == plan.epochs)
    if plan.drafts is not None:
        wanted &= plan.drafts.others
    if not wanted.all():
        index = np.flatnonzero(wanted)
        at, ids = at[index], ids[index]
    fixed = running.fixed_of(at)
    known = batch.known[at] + 1
    full = known >= fixed.max_len
    stopped = (fixed.stop_ids == ids[:, None]).any(axis=1) & (known > fixed.min_len) & ~full
    result = StepResult(at, ids, fixed.owners, fixed.request_ids, {}, [], [])
    first = known == fixed.num_prompt + 1
    more = full | stopped | first
    if output.logprobs is not None:
        more |= batch.sampling.has_extras[at]
    with_delta: list[Sequence] = []  # whom the deltas are of
    for i in np.flatnonzero(more).tolist():
        sequence, token = batch.sequences[at[i]], int(ids[i])
        query = i if index is None else int(index[i])
        logprobs = _logprobs(sequence, [query], [token], output.logprobs)
        result.deltas[i] = _delta(sequence, [token], full[i], stopped[i], logprobs)
        with_delta.append(sequence)
        if first[i]:
            result.begun.append(sequence)
    drafts = None if plan.drafts is None else _verified(batch, plan, output, result, with_delta)
    prompts = [] if output.prompt is None else prompt_results(batch, plan, output.prompt)
    # From here on nothing raises.
    batch.tokens[at, known - 1] = ids
    batch.known[at] = known
    if drafts is not None:
        _append_accepted(batch, drafts)
    for sequence, delta in zip(with_delta, result.deltas.values(), strict=True):
        sequence.finish_reason, sequence.stop_reason = delta.finish_reason, delta.stop_reason
        counts = sequence.drafts
        counts.accepted = max(counts.accepted, delta.accepted)
        counts.rejected = max(counts.rejected, delta.rejected)
        if delta.finish_reason:
            result.ended.append(sequence)
    for one in prompts:
        one.commit()
        result.prompts += [(one.sequence.owner, delta) for delta in one.deltas]
        if one.finish_reason:
            result.begun.append(one.sequence)
            result.ended.append(one.sequence)
    return result


def end(result: StepResult, index: int, sequence: Sequence) -> None:
    """Entry `index` of a committed step is the sequence's last token after all: nothing may follow it."""
    if (delta := result.deltas.get(index)) is None:
        delta = result.deltas[index] = _delta(sequence, [int(result.token_ids[index])], False, False, None)
        delta.accepted, delta.rejected = sequence.drafts.accepted, sequence.drafts.rejected
    delta.finish_reason = sequence.finish_reason = "stop"
    result.ended.append(sequence)


def take_back_end(result: StepResult, index: int, sequence: Sequence) -> None:
    """Entry `index` of a committed step ended the sequence, but should not have."""
    delta = result.deltas[index]
    delta.finish_reason = sequence.finish_reason = ""
    delta.stop_reason = sequence.stop_reason = -1
    result.ended.remove(sequence)


def _verified(
    batch: InputBatch, plan: Plan, output: StepOutput, result: StepResult, with_delta: list[Sequence]
) -> Verification:
    """Verify the step's draft tokens and add the tokens of their slots, up to a sequence's end, to `result`."""
    assert plan.drafts is not None
    drafts = plan.drafts.among(batch.epoch[plan.drafts.slots] == plan.epochs[plan.drafts.first])
    at, fed = drafts.slots, None if output.ngram is None else output.ngram.fed
    known, max_len = batch.known[at], batch.max_len[at]
    found = verify(drafts, output.token_ids, drafts.fed(fed), known, max_len, batch.min_len[at], batch.stop_ids[at])
    begin = len(result.slots)
    result.slots = np.concatenate([result.slots, at])
    result.token_ids = np.concatenate([result.token_ids, found.tokens[np.arange(len(at)), found.lengths - 1]])
    result.owners = np.concatenate([result.owners, batch.owner[at]])
    result.request_ids = np.concatenate([result.request_ids, batch.request_ids[at]])
    result.verification = found
    full = known + found.lengths >= max_len
    for i, slot in enumerate(at.tolist()):
        sequence, tokens = batch.sequences[slot], found.tokens[i, : found.lengths[i]].tolist()
        first, accepted = int(drafts.first[i]), int(found.accepted[i])
        logprobs = _logprobs(sequence, range(first, first + len(tokens)), tokens, output.logprobs)
        counts = sequence.drafts.accepted + accepted, sequence.drafts.rejected + int(found.counts[i]) - accepted
        result.deltas[begin + i] = _delta(sequence, tokens, full[i], found.stopped[i], logprobs, *counts)
        with_delta.append(sequence)
    return found


def _append_accepted(batch: InputBatch, found: Verification) -> None:
    """Append the verified tokens and subtract rejected draft tokens from what counts as scheduled and computed."""
    at, known = found.slots, batch.known[found.slots]
    places = np.arange(found.tokens.shape[1])
    inside = places < found.lengths[:, None]
    batch.tokens[np.repeat(at, found.lengths), (known[:, None] + places)[inside]] = found.tokens[inside]
    batch.known[at] = known + found.lengths
    surplus = found.counts + 1 - found.lengths
    batch.total[at] -= surplus
    # A slot without blocks was preempted meanwhile: none of its tokens are computed.
    batch.computed[at] -= np.where(batch.num_blocks[at] > 0, surplus, 0)


def _delta(
    sequence: Sequence,
    tokens: list[int],
    full: bool,
    stopped: bool,
    logprobs: list[TokenLogprob] | None,
    accepted: int = 0,
    rejected: int = 0,
) -> TokenDelta:
    """`full`, `stopped`: its last token ended it, for being the last it may have, or a stop id."""
    reason = "length" if full else "stop" if stopped else ""
    stop_reason = tokens[-1] if stopped else -1
    return TokenDelta(
        sequence.request_id, tokens, reason, stop_reason, sequence.cached_tokens, logprobs, accepted, rejected,
        cache_miss=sequence.cache_miss,
    )  # fmt: skip


def _logprobs(
    sequence: Sequence, indices: Iterable[int], tokens: list[int], step: StepLogprobs | None
) -> list[TokenLogprob] | None:
    """Of the tokens, sampled by the queries `indices` of the step."""
    wanted = sequence.params.logprobs
    if wanted is None or step is None:
        return None
    return [_logprob(token, index, wanted, step) for index, token in zip(indices, tokens, strict=True)]


def _logprob(token: int, index: int, wanted: int, step: StepLogprobs) -> TokenLogprob:
    """Of `token`, sampled by query `index`."""
    rank = int(step.ranks[index])
    top_ids = with_chosen(token, rank, step.top_ids[index, :wanted].tolist())
    return TokenLogprob(token, float(step.chosen[index]), rank, top_ids, step.top_values[index, :wanted].tolist())
