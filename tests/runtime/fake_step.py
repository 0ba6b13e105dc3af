"""A step that computes tokens from paged memory, without a model.

It stores token ids in slots, as attention stores K and V, and samples a hash of everything it reads back through the
block tables. A wrong block, slot, prefix hit, preemption or draft token therefore gives a wrong token.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.inputs import (
    Deferred,
    NgramOutput,
    PromptInput,
    PromptOutput,
    StepInput,
    StepLogprobs,
    StepOutput,
)
from pagegraph.compiler.step.step import Ticket
from pagegraph.runtime.ipc.protocol import SamplingParams

BLOCK = 4
EOS = 7
MAX_LEN = 40
VOCAB = 11


def next_token(history: list[int], seed: int) -> int:
    """What the model of these tests says after `history`."""
    return zlib.crc32(bytes(history) + seed.to_bytes(2, "little")) % VOCAB


def masked_token(token: int, allowed: int) -> int:
    """`token`, or the next one that the bits allow; 0 where they allow none, as of a device's argmax."""
    if allowed == -1:
        return token
    return next((at % VOCAB for at in range(token, token + VOCAB) if allowed >> at % VOCAB & 1), 0)


class Read(NamedTuple):
    """What the queries of a step read."""

    fed: np.ndarray  # the last token fed to each
    histories: list[list[int]]  # all tokens that each sees
    prompt: PromptOutput | None  # log-probabilities of prompts, if the step wants any


class FakeStep:
    """Paged memory of token ids, slots of last samples, and the same order of work as a device, at the engine's seam.

    `says`, of a history and a seed, is the token behind it. `draft`, of the same, gives the draft tokens for a slot's next
    step and how many tokens they were looked up by. Steps run at their launch; what one raises, waiting raises.
    """

    counts = StepCounts()
    refuses: Callable[[StepInput], bool] | None = None  # steps whose launch raises
    breaks: Callable[[StepInput], bool] | None = None  # steps that raise once they run

    def __init__(
        self,
        num_blocks: int,
        max_num_seqs: int,
        draft: Callable[[list[int], int], tuple[list[int], int]] | None = None,
        *,
        says: Callable[[list[int], int], int] = next_token,
        block_size: int = BLOCK,
        max_len: int = MAX_LEN,
        accepts: bool = True,
    ) -> None:
        self.block_size = block_size
        self.memory = np.full(num_blocks * block_size, -5, np.int64)
        self.tables = np.zeros((max_num_seqs, -(-max_len // block_size)), np.int64)
        self.last = np.zeros(max_num_seqs, np.int64)
        self.last_at = np.zeros(max_num_seqs, np.int64)
        self.says = says
        self.draft = draft
        self.accepts = accepts  # queries behind a slot's first are draft tokens, as of any model but a draft model
        self.draft_tokens: dict[int, list[int]] = {}
        self.launches = 0
        self.queries: list[int] = []  # of each step
        self.tokens: list[int] = []

    def launch(self, step: StepInput, num_steps: int = 1) -> Ticket:
        if self.refuses is not None and self.refuses(step):
            raise RuntimeError("cannot be launched")
        self.launches += 1
        output: StepOutput | Exception
        try:
            if self.breaks is not None and self.breaks(step):
                self.memory[:] = -9  # whatever it has written
                raise RuntimeError("broken on the device")
            if step.sampling.masked is not None:
                return self._launch_masked(step)
            output = self.run(step) if num_steps == 1 else self._run_on(step, num_steps)
        except Exception as error:
            output = error

        def wait() -> StepOutput:
            if isinstance(output, Exception):
                raise output
            return output

        return Ticket(Deferred(wait))

    def _launch_masked(self, step: StepInput) -> Ticket:
        """Forward at the launch, samples once the masks are there."""
        read = self._forward(step)
        masked = step.sampling.masked
        assert masked is not None
        masks = np.full((len(masked), 1), -1, np.int32)

        def sample() -> Deferred:
            allowed = dict(zip(masked.tolist(), masks[:, 0].tolist(), strict=True))
            for query, ids in step.sampling.allowed.items():
                allowed[query] &= sum(1 << token for token in ids.tolist())
            for query, token, value in zip(*step.sampling.bias or ((), (), ())):
                allowed[query] &= -1 if value > -np.inf else ~(1 << token)
            output = self._sample(step, read, allowed)
            return Deferred(lambda: output)

        return Ticket(None, masks, sample)

    def _run_on(self, step: StepInput, num_steps: int) -> StepOutput:
        """The step, and those in which each of its slots goes on by a token."""
        assert step.sampled.all() and step.num_tokens == len(set(step.slots.tolist())), (
            "a token of each of several slots"
        )
        sampled = [self.run(step).token_ids]
        onward = dataclasses.replace(step, token_ids=np.full_like(step.token_ids, -1), new_blocks=step.new_blocks[:0])
        for at in range(1, num_steps):
            sampled.append(self.run(dataclasses.replace(onward, starts=step.starts + at)).token_ids)
        return StepOutput(np.stack(sampled, axis=1))

    def run(self, step: StepInput) -> StepOutput:
        return self._sample(step, self._forward(step), {})

    def _forward(self, step: StepInput) -> Read:
        self.queries.append(step.num_seqs)
        self.tokens.append(step.num_tokens)
        self.tables[step.new_blocks[:, 0], step.new_blocks[:, 1]] = step.new_blocks[:, 2]
        counts = np.diff(step.query_start)
        owners = np.repeat(step.slots, counts)
        first = step.token_ids[step.query_start[:-1]]
        starts = np.where(first < 0, self.last_at[step.slots] - 1 - first, step.starts)
        assert (starts <= step.starts).all(), "a slot stands behind where it can be at most"
        slot_mapping = self._mapped(owners, np.arange(len(owners)) + np.repeat(starts - step.query_start[:-1], counts))
        ids = step.token_ids.astype(np.int64)
        for at in np.flatnonzero(ids < 0).tolist():
            ids[at] = self.last[owners[at]] if ids[at] == -1 else self.draft_tokens[int(owners[at])][-2 - ids[at]]
        assert (
            len(set(slot_mapping.tolist())) == len(slot_mapping)
            and slot_mapping.min(initial=self.block_size) >= self.block_size
        )
        self.memory[slot_mapping] = ids
        histories = []
        for slot, length in zip(step.slots.tolist(), (starts + counts).tolist()):
            histories.append(self.memory[self._mapped(slot, np.arange(length))].tolist())
            assert min(histories[-1]) >= 0, "a slot was read before it was written"
        prompt = None
        if step.prompt is not None:
            positions = np.arange(len(ids)) + np.repeat(starts - step.query_start[:-1], counts)
            prompt = read_prompt(step.prompt, ids, positions)
        return Read(ids[step.query_start[1:] - 1], histories, prompt)

    def _sample(self, step: StepInput, read: Read, allowed: dict[int, int]) -> StepOutput:
        """`allowed`: bits of the tokens that a query may sample, of those with masks."""
        sampled = []
        for query, (history, seed) in enumerate(zip(read.histories, step.sampling.seeds.tolist(), strict=True)):
            token = self.says(history, seed)
            sampled.append(masked_token(token, allowed[query]) if query in allowed else token)
        ngram = self._hand_over(step, read.fed, sampled, read.histories)
        return StepOutput(
            np.array(sampled, np.int32), ngram=ngram if self.draft is not None else None, prompt=read.prompt
        )

    def _mapped(self, slots: np.ndarray | int, positions: np.ndarray) -> np.ndarray:
        return self.tables[slots, positions // self.block_size] * self.block_size + positions % self.block_size

    def _hand_over(
        self, step: StepInput, fed: np.ndarray, sampled: list[int], histories: list[list[int]]
    ) -> NgramOutput:
        """Each slot's last token that holds, and draft tokens behind it, to its next step."""
        matched, hits = np.zeros((2, step.num_seqs), np.int32)
        s = 0
        while s < step.num_seqs:
            slot, kept, end = int(step.slots[s]), s, s + 1
            while self.accepts and end < step.num_seqs and step.slots[end] == slot:
                kept += kept == end - 1 and fed[end] == sampled[kept]
                end += 1
            hits[s] = self.draft_tokens.get(slot, [])[:1] == sampled[s : s + 1]
            if step.sampled[s] or end - s > 1:
                self.last[slot], self.last_at[slot] = sampled[kept], len(histories[kept])
                if self.draft is not None:
                    history, seed = [*histories[kept], sampled[kept]], int(step.sampling.seeds[s])
                    self.draft_tokens[slot], matched[s] = self.draft(history, seed)
            s = end
        return NgramOutput(matched, hits, fed.astype(np.int32))


def read_prompt(asked: PromptInput, ids: np.ndarray, positions: np.ndarray) -> PromptOutput:
    """What the model of these tests has for a prompt: the log-probability of a token tells it, the one before it and
    where that is; a hidden state is (1, token, position).
    """
    assert asked.num_rows.sum() == len(asked.rows) == len(asked.targets) and asked.num_summed.sum() == len(asked.summed)
    rows = asked.rows
    top = np.arange(asked.num_logprobs, dtype=np.int32)[None]
    logprobs = StepLogprobs(
        -(asked.targets + 100.0 * ids[rows] + 1e4 * positions[rows]).astype(np.float32),
        1 + asked.targets, np.repeat(top, len(rows), axis=0), np.zeros((len(rows), asked.num_logprobs), np.float32),
    )  # fmt: skip
    hidden = np.stack([np.ones(len(ids)), ids, positions], axis=1).astype(np.float32)
    ends = np.cumsum(asked.num_summed)
    sums = np.stack([hidden[asked.summed[end - n : end]].sum(0) for n, end in zip(asked.num_summed, ends)])
    return PromptOutput(asked, logprobs if len(rows) else None, sums if len(asked.summed) else None)


def alone(prompt: list[int], params: SamplingParams, seed: int) -> tuple[list[int], str]:
    """The tokens a sequence must get, computed without any engine."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens, seed))
        made = len(tokens) - len(prompt)
        if made >= params.max_tokens or len(tokens) >= MAX_LEN:
            return tokens[len(prompt) :], "length"
        if made > params.min_tokens and tokens[-1] == EOS and not params.ignore_eos:
            return tokens[len(prompt) :], "stop"


def check_outputs(sequences: dict, got: dict[str, list[int]], ended: dict[str, str]) -> None:
    """Every sequence got the tokens it must get, up to where it was aborted, and ended for the right reason."""
    for key, sequence in sequences.items():
        tokens, reason = alone(sequence.tokens[: sequence.num_prompt].tolist(), sequence.params, sequence.seed)
        if ended[key] == "abort":
            assert got[key] == tokens[: len(got[key])]
        else:
            assert (got[key], ended[key]) == (tokens, reason)
