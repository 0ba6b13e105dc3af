"""One sequence on its way through the engine: its tokens, how far it is computed, when it stops.

Knows no pages beyond the list it holds, no scheduling order and no text: stop strings are found after
detokenising, by whoever reads the tokens.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from runtime.protocol import SamplingParams


class State(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Half-open ranges: tokens[:computed] have their KV in pages (or in a launched step), the rest has not.

    `in_flight` samples are scheduled but not on the host: they count as tokens whose ids are unknown.
    """

    request_id: str
    tokens: list[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    seed: int
    max_model_len: int
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    num_prompt: int = field(init=False)
    max_len: int = field(init=False)  # tokens at which it ends, whatever they are
    stop_ids: frozenset[int] = field(init=False)  # ids that end it, EOS included unless ignored
    bias_ids: np.ndarray = field(init=False)  # int32, the keys of logit_bias
    bias_values: np.ndarray = field(init=False)  # float32, its values
    allowed_ids: np.ndarray | None = field(init=False)  # int32, None: all
    order: int = -1  # of addition to the scheduler, breaks ties of priority and arrival
    computed: int = 0
    in_flight: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))  # int32, so that packing copies memory
    hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks of known tokens
    num_registered: int = 0  # leading blocks that were offered to the prefix cache
    row: int = -1
    state: State = State.WAITING
    finish_reason: str = ""
    stop_reason: int = -1
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission

    def __post_init__(self) -> None:
        params = self.params
        self.num_prompt = len(self.tokens)
        self.max_len = min(self.num_prompt + params.max_tokens, self.max_model_len)
        eos = frozenset() if params.ignore_eos else self.eos_ids
        self.stop_ids = eos.union(params.stop_token_ids)
        self.bias_ids = np.fromiter(params.logit_bias.keys(), np.int32, len(params.logit_bias))
        self.bias_values = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        allowed = params.allowed_token_ids
        self.allowed_ids = None if allowed is None else np.array(allowed, np.int32)

    @property
    def place(self) -> tuple[int, float, int]:
        """Sort key of the queue and of the running set, smaller first."""
        return self.priority, self.arrival, self.order

    @property
    def total(self) -> int:
        """Tokens there will be once what is in flight has arrived."""
        return len(self.tokens) + self.in_flight

    @property
    def is_decode(self) -> bool:
        """Exactly one token waits to be computed."""
        return len(self.tokens) + self.in_flight - self.computed == 1

    @property
    def at_length_limit(self) -> bool:
        """No further token may be sampled, whatever those in flight turn out to be."""
        return len(self.tokens) + self.in_flight >= self.max_len

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0

    def append(self, token: int) -> str:
        """Take the next sampled token -> finish reason, "" to go on.

        Length is looked at first, then min_tokens, then EOS and stop ids: a stop id that is also the last token
        allowed ends the sequence with "length".
        """
        self.tokens.append(token)
        if len(self.tokens) >= self.max_len:
            return "length"
        if len(self.tokens) - self.num_prompt > self.params.min_tokens and token in self.stop_ids:
            self.stop_reason = token
            return "stop"
        return ""
