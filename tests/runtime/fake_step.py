"""A step that computes tokens from paged memory, without a model.

It stores token ids in slots, as attention stores K and V, and samples a hash of everything it reads back through the
block tables. A wrong block, slot, prefix hit, preemption or draft token therefore gives a wrong token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from pagegraph.compiler.step.inputs import NgramOutput, StepInput, StepOutput
from pagegraph.runtime.ipc.protocol import SamplingParams

BLOCK = 4
EOS = 7
MAX_LEN = 40
VOCAB = 11


def next_token(history: list[int], seed: int) -> int:
    """What the model of these tests says after `history`."""
    return zlib.crc32(bytes(history) + seed.to_bytes(2, "little")) % VOCAB


class FakeStep:
    """Paged memory of token ids, slots of last samples, and the same order of work as a device.

    `draft token`, of a slot's tokens and seed, makes the draft tokens for its next step, as a device that looks up does.
    """

    def __init__(
        self, num_blocks: int, max_num_seqs: int, draft: Callable[[list[int], int], list[int]] | None = None
    ) -> None:
        self.memory = np.full(num_blocks * BLOCK, -5, np.int64)
        self.tables = np.zeros((max_num_seqs, -(-MAX_LEN // BLOCK)), np.int64)
        self.last = np.zeros(max_num_seqs, np.int64)
        self.last_at = np.zeros(max_num_seqs, np.int64)
        self.draft = draft
        self.draft_tokens: dict[int, list[int]] = {}
        self.steps = 0

    def run(self, step: StepInput) -> StepOutput:
        self.steps += 1
        self.tables[step.new_blocks[:, 0], step.new_blocks[:, 1]] = step.new_blocks[:, 2]
        counts = np.diff(step.query_start)
        owners = np.repeat(step.slots, counts)
        first = step.token_ids[step.query_start[:-1]]
        starts = np.where(first < 0, self.last_at[step.slots] - 1 - first, step.starts)
        assert (starts <= step.starts).all(), "a slot stands behind where it can be at most"
        positions = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, counts)])
        slot_mapping = self.tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK
        ids = step.token_ids.astype(np.int64)
        for at in np.flatnonzero(ids < 0).tolist():
            ids[at] = self.last[owners[at]] if ids[at] == -1 else self.draft_tokens[int(owners[at])][-2 - ids[at]]
        assert len(set(slot_mapping.tolist())) == len(slot_mapping) and slot_mapping.min(initial=BLOCK) >= BLOCK
        self.memory[slot_mapping] = ids
        sampled, matched = [], np.zeros(step.num_seqs, np.int32)
        histories = []
        for s in range(step.num_seqs):
            length = starts[s] + counts[s]
            table = self.tables[step.slots[s]]
            histories.append([int(self.memory[table[at // BLOCK] * BLOCK + at % BLOCK]) for at in range(length)])
            assert min(histories[-1]) >= 0, "a slot was read before it was written"
            sampled.append(next_token(histories[-1], int(step.sampling.seeds[s])))
        fed = ids[step.query_start[1:] - 1]
        s = 0
        while s < step.num_seqs:
            slot, kept, end = int(step.slots[s]), s, s + 1
            while end < step.num_seqs and step.slots[end] == slot:
                kept += kept == end - 1 and fed[end] == sampled[kept]
                end += 1
            if step.sampled[s] or end - s > 1:
                self.last[slot], self.last_at[slot] = sampled[kept], len(histories[kept])
                if self.draft is not None:
                    self.draft_tokens[slot] = self.draft([*histories[kept], sampled[kept]], int(step.sampling.seeds[s]))
                    matched[s] = 1
            s = end
        ngram = None if self.draft is None else NgramOutput(matched, None, fed.astype(np.int32))
        return StepOutput(np.array(sampled, np.int32), ngram=ngram)


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
