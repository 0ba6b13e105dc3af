"""What one step takes and gives, as plain numpy: the vocabulary shared by scheduler and device.

Knows no torch, no device and no padding: arrays hold exactly the T tokens and S sequences of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(slots=True)
class Filters:
    """Truncation of the S distributions of a step; arrays [S]. Off: top_k 0, top_p 1, min_p 0."""

    top_k: np.ndarray  # int32
    top_p: np.ndarray  # float32
    min_p: np.ndarray  # float32


@dataclass(slots=True)
class Penalties:
    """Penalties on tokens seen before; float32 [S]. Off: repetition 1, presence 0, frequency 0."""

    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray


@dataclass(slots=True)
class SamplingInput:
    """Sampling parameters of the S sequences of a step. Temperature 0 is argmax. None: no sequence asks for it."""

    temperature: np.ndarray  # float32 [S]
    seeds: np.ndarray  # int64 [S]
    filters: Filters | None = None
    penalties: Penalties | None = None
    # Token counts to rebuild before this step: (slot, prompt ids, output ids)
    penalty_reset: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    # Addends to logits, int32 [B] index into the S sequences, int32 [B] token, float32 [B], -inf forbids the token
    bias: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    allowed: dict[int, np.ndarray] = field(default_factory=dict)  # index in S -> int32 allowed ids
    # int32 [R] indices in S whose tokens a bitmask restricts, which comes after the launch (`Ticket.masks`)
    masked: np.ndarray | None = None
    num_logprobs: int = -1  # largest top-n asked for in the step, -1 for none

    @property
    def is_plain(self) -> bool:
        """Whether temperature and seed are all that the step asks for."""
        return self.masked is None and self.is_plain_but_masked

    @property
    def is_plain_but_masked(self) -> bool:
        """Whether masks, temperature and seed are all that the step asks for."""
        return (
            self.filters is None
            and self.penalties is None
            and self.bias is None
            and not self.allowed
            and self.num_logprobs < 0
        )


@dataclass(slots=True)
class PromptInput:
    """What Q sequences of a step ask of the hidden states of their prompts' tokens; int32.

    Log-probabilities: `num_rows[q]` of `rows` are theirs, a token of the step each, and `targets` the token that follows
    it. Sums: `num_summed[q]` of the tokens `summed`, whose hidden states are added up.
    """

    queries: np.ndarray  # [Q] indices of the step's sequences
    rows: np.ndarray  # [R]
    targets: np.ndarray  # [R]
    num_rows: np.ndarray  # [Q]
    num_logprobs: int  # largest top-n asked for
    summed: np.ndarray
    num_summed: np.ndarray  # [Q]


@dataclass(slots=True)
class StepInput:
    """One ragged step: T tokens of S sequences, sequence s owning tokens query_start[s]:query_start[s+1].

    The device keeps the block table of every slot, so a step brings only what is new in them. Positions and
    slot_mapping follow from `starts` and the tables; a sampled token's position is that after its sequence's last.
    Draft tokens are sequences of one token each behind that of their slot. Where a sequence begins with a token that
    only the device knows, its start may be known to it alone too: `starts` is then the last it can be.
    """

    # int32 [T]; -1 and below stand for tokens that only the device knows: -1 the slot's last sampled token, -2 - j its
    # draft token j
    token_ids: np.ndarray
    slots: np.ndarray  # int32 [S], slot of each sequence
    query_start: np.ndarray  # int32 [S + 1]
    starts: np.ndarray  # int32 [S], position of each sequence's first token in this step
    sampled: np.ndarray  # bool [S], False where a prefill chunk ends before the prompt does
    new_blocks: np.ndarray  # int32 [P, 3]: (slot, index in the slot's block table, block)
    sampling: SamplingInput
    # (slot, int32 tokens) of those that begin with tokens found in the cache
    cached: list[tuple[int, np.ndarray]] = field(default_factory=list)
    prompt: PromptInput | None = None
    # (from row, to row) of the pools of recurrent state, copied in this order before the step
    state_copies: Collection[tuple[int, int]] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.slots)

    @property
    def seq_lens(self) -> np.ndarray:
        """int32 [S], KV length with this step's tokens, at most."""
        return self.starts + np.diff(self.query_start)


@dataclass(slots=True)
class StepLogprobs:
    """Log-probabilities of raw logits (float32 log-softmax), rank = 1 + number of strictly larger logits."""

    chosen: np.ndarray  # float32 [S]
    ranks: np.ndarray  # int32 [S]
    top_ids: np.ndarray  # int32 [S, n]
    top_values: np.ndarray  # float32 [S, n]


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """The answer to a PromptInput."""

    asked: PromptInput
    logprobs: StepLogprobs | None  # of its R rows; None where there are none
    sums: np.ndarray | None  # float32 [Q, H]; None where nothing is summed


@dataclass(frozen=True, slots=True)
class NgramOutput:
    """What the n-gram proposer in the step found; int32 [S]. `matched` and `hits` stand at each slot's first query."""

    matched: np.ndarray  # length of the match that the new draft tokens continue, 0 for none
    hits: np.ndarray | None  # 1 if the drafted token equals the sampled one; None unless sampling is plain
    fed: np.ndarray  # the last token of each query


@dataclass(slots=True)
class StepOutput:
    """Sampled ids of the S sequences, in the order of the step's slots."""

    token_ids: np.ndarray  # int32 [S]; of several steps in a row [S, num_steps]
    logprobs: StepLogprobs | None = None
    ngram: NgramOutput | None = None
    prompt: PromptOutput | None = None


class Pending(Protocol):
    """The output of a launched step, which may not be there yet; a Future is one."""

    def result(self, timeout: float | None = None) -> StepOutput:
        """Wait for it. Raises what the step raised, and TimeoutError after so many seconds."""
        ...

    def done(self) -> bool:
        """Whether `result` would not wait."""
        ...


@dataclass(frozen=True, slots=True)
class Deferred:
    """A Pending whose output comes of a call."""

    give: Callable[[], StepOutput]

    def result(self, timeout: float | None = None) -> StepOutput:
        return self.give()

    def done(self) -> bool:
        return True
