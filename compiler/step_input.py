"""What one step takes and gives, as plain numpy: the vocabulary shared by scheduler and device.

Knows no torch, no device and no padding: arrays hold exactly the T tokens and S sequences of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class SamplingInput:
    """Sampling parameters of the S sequences of a step; arrays are [S] unless said.

    Values that switch a filter off: top_k 0, top_p 1, min_p 0, repetition 1, presence 0, frequency 0.
    Temperature 0 is argmax.
    """

    temperature: np.ndarray  # float32
    top_k: np.ndarray  # int32
    top_p: np.ndarray  # float32
    min_p: np.ndarray  # float32
    seeds: np.ndarray  # int64
    positions: np.ndarray  # int32, index of the sampled token in its sequence: the RNG counter
    repetition: np.ndarray  # float32
    presence: np.ndarray  # float32
    frequency: np.ndarray  # float32
    bias_rows: np.ndarray  # int32 [B], index into the S sequences
    bias_tokens: np.ndarray  # int32 [B]
    bias_values: np.ndarray  # float32 [B], added to the logit; -inf forbids the token
    allowed: dict[int, np.ndarray] = field(default_factory=dict)  # index in S -> int32 allowed ids
    num_logprobs: int = -1  # largest top-n asked for in the step, -1 for none
    # (row, prompt ids, output ids): token counts to rebuild before this step
    penalty_reset: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass(slots=True)
class StepInput:
    """One ragged step: T tokens of S sequences, sequence s owning tokens query_start[s]:query_start[s+1]."""

    token_ids: np.ndarray  # int32 [T], -1: the row's last sampled token, known to the device only
    positions: np.ndarray  # int32 [T]
    slots: np.ndarray  # int32 [T], block * block_size + offset
    rows: np.ndarray  # int32 [S], device row of each sequence
    query_start: np.ndarray  # int32 [S + 1]
    seq_lens: np.ndarray  # int32 [S], KV length with this step's tokens
    block_tables: np.ndarray  # int32 [S, blocks], unused entries 0
    sampled: np.ndarray  # bool [S], False where a prefill chunk ends before the prompt does
    sampling: SamplingInput

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.rows)


@dataclass(slots=True)
class StepLogprobs:
    """Log-probabilities of raw logits (float32 log-softmax), rank = 1 + number of strictly larger logits."""

    chosen: np.ndarray  # float32 [S]
    ranks: np.ndarray  # int32 [S]
    top_ids: np.ndarray  # int32 [S, n]
    top_values: np.ndarray  # float32 [S, n]


@dataclass(slots=True)
class StepOutput:
    """Sampled ids of the S sequences, in the order of the step's rows."""

    token_ids: np.ndarray  # int32 [S]
    logprobs: StepLogprobs | None = None
