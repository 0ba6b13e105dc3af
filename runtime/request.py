"""One sequence on its way through the engine: its tokens, how far it is computed, when it stops.

Knows no pages beyond the list it holds, no scheduling order and no text: stop strings are found after
detokenising, by whoever reads the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

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
    computed: int = 0
    in_flight: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of known tokens, kept by the scheduler
    num_registered: int = 0  # blocks whose hash the pool knows or needs not know
    row: int = -1
    state: State = State.WAITING
    finish_reason: str = ""
    stop_reason: int = -1
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def total(self) -> int:
        """Tokens there will be once what is in flight has arrived."""
        return len(self.tokens) + self.in_flight

    @property
    def num_outputs(self) -> int:
        """Output tokens, those in flight included."""
        return self.total - self.num_prompt

    @property
    def at_length_limit(self) -> bool:
        """No further token may be sampled, whatever those in flight turn out to be."""
        return self.num_outputs >= self.params.max_tokens or self.total >= self.max_model_len

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end the sequence, EOS included unless ignored."""
        eos = frozenset() if self.params.ignore_eos else self.eos_ids
        return eos.union(self.params.stop_token_ids)

    def append(self, token: int) -> str:
        """Take the next sampled token -> finish reason, "" to go on. A stop counts only past min_tokens."""
        self.tokens.append(token)
        num_outputs = len(self.tokens) - self.num_prompt
        if num_outputs > self.params.min_tokens and token in self.stop_ids:
            self.stop_reason = token
            return "stop"
        if num_outputs >= self.params.max_tokens or len(self.tokens) >= self.max_model_len:
            return "length"
        return ""
