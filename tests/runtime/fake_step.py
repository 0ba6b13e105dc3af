"""A step that computes tokens from paged memory, without a model.

It stores token ids in slots, as attention stores K and V, and samples a hash of everything it reads back through the
block tables. A wrong page, slot, prefix hit, preemption or guess therefore gives a wrong token.
"""

from __future__ import annotations

import zlib

import numpy as np

from compiler.step_input import StepInput, StepOutput
from runtime.protocol import SamplingParams

BLOCK = 4
EOS = 7
MAX_LEN = 40
VOCAB = 11


def next_token(history: list[int], seed: int) -> int:
    """What the model of these tests says after `history`."""
    return zlib.crc32(bytes(history) + seed.to_bytes(2, "little")) % VOCAB


class FakeStep:
    """Paged memory of token ids, rows of last samples, and the same order of work as a device."""

    def __init__(self, num_blocks: int, max_num_seqs: int) -> None:
        self.memory = np.full(num_blocks * BLOCK, -5, np.int64)
        self.tables = np.zeros((max_num_seqs, -(-MAX_LEN // BLOCK)), np.int64)
        self.last = np.zeros(max_num_seqs, np.int64)
        self.steps = 0

    def run(self, step: StepInput) -> StepOutput:
        self.steps += 1
        self.tables[step.pages[:, 0], step.pages[:, 1]] = step.pages[:, 2]
        counts = np.diff(step.query_start)
        owners = np.repeat(step.rows, counts)
        positions = np.concatenate([np.arange(start, start + n) for start, n in zip(step.starts, counts)])
        slots = self.tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK
        ids = np.where(step.token_ids < 0, self.last[owners], step.token_ids)
        assert len(set(slots.tolist())) == len(slots) and slots.min(initial=BLOCK) >= BLOCK
        self.memory[slots] = ids
        sampled = []
        for s in range(step.num_seqs):
            length = step.seq_lens[s]
            table = self.tables[step.rows[s]]
            history = [int(self.memory[table[at // BLOCK] * BLOCK + at % BLOCK]) for at in range(length)]
            assert min(history) >= 0, "a slot was read before it was written"
            sampled.append(next_token(history, int(step.sampling.seeds[s])))
            if step.sampled[s]:
                self.last[step.rows[s]] = sampled[-1]
        return StepOutput(np.array(sampled, np.int32))


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
