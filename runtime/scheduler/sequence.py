"""A sequence on its way through the engine: its parameters, its tokens while it waits, how it ended.

While it runs its tokens and counts stand in `runtime.scheduler.input_batch`. Knows no blocks, no scheduling order and
no text: stop strings are found after detokenising, by whoever reads the tokens.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from enum import Enum
from operator import attrgetter

import numpy as np

from pagegraph.runtime.grammar.matcher import TokenMatcher
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.pooling import Pooler


class State(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, eq=False)
class LogitRules:
    """What a request asks of its logits, as arrays for the device."""

    bias_ids: np.ndarray  # int32, the keys of logit_bias
    bias_values: np.ndarray  # float32, its values
    allowed_ids: np.ndarray | None  # int32, None: all

    @staticmethod
    def of(params: SamplingParams) -> LogitRules:
        bias, allowed = params.logit_bias, params.allowed_token_ids
        return LogitRules(
            np.fromiter(bias.keys(), np.int32, len(bias)),
            np.fromiter(bias.values(), np.float32, len(bias)),
            None if allowed is None else np.array(allowed, np.int32),
        )


@dataclass(slots=True)
class Prefix:
    """What of a sequence the prefix cache knows, or may."""

    hashes: list[bytes] = field(default_factory=list)  # of leading full blocks of known tokens
    num_registered: int = 0  # leading blocks that were offered to the cache
    state_ends: list[int] = field(default_factory=list)  # computed tokens at which the recurrent state is to be kept


@dataclass(slots=True)
class Samples:
    """The sequences of one prompt that were asked for together; metrics read it."""

    count: int = 0
    num_served: int = 0
    most_tokens: int = 0  # generated, of those served

    def served(self, tokens: int) -> bool:
        """One more came to its end with so many tokens; whether it is the last."""
        self.num_served += 1
        self.most_tokens = max(self.most_tokens, tokens)
        return self.num_served == self.count


@dataclass(slots=True)
class Times:
    """When a sequence got on, in seconds of the engine's clock; NaN: not yet."""

    launched: float = float("nan")  # its first step
    first_token: float = float("nan")
    last_token: float = float("nan")  # out of date while the sequence is in a slot


@dataclass(slots=True)
class DraftCounts:
    """What became of a sequence's draft tokens."""

    accepted: int = 0  # became its own
    rejected: int = 0


@dataclass(slots=True)
class PromptReads:
    """What a request asks of its prompt's tokens besides the output, and how much of it has come."""

    num_logprobs: int | None  # of the likeliest tokens, beside each of the prompt's own
    pooler: Pooler | None  # of the embedding that is asked for
    num_told: int = 0  # prompt tokens behind the first whose log-probabilities have been sent
    total: np.ndarray | None = None  # of the hidden states that are pooled, as far as they are computed

    @staticmethod
    def of(params: SamplingParams, pooler: Pooler | None) -> PromptReads | None:
        """None if it asks nothing."""
        if params.prompt_logprobs is None and params.pooling is None:
            return None
        return PromptReads(params.prompt_logprobs, None if params.pooling is None else pooler)

    def owed(self, start: int, end: int, num_prompt: int) -> range:
        """Positions in [start, end) that are followed by a prompt token whose log-probability is still to be told."""
        if self.num_logprobs is None:
            return range(0)
        end = min(end, num_prompt - 1)
        return range(min(max(start, self.num_told), end), end)

    def pooled(self, start: int, end: int, num_prompt: int) -> range:
        """Positions in [start, end) whose hidden states are pooled."""
        if self.pooler is None:
            return range(0)
        first, last = {"last": (num_prompt - 1, num_prompt), "cls": (0, 1), "mean": (0, num_prompt)}[
            self.pooler.pooling
        ]
        first = max(first, start)
        return range(first, max(min(last, end), first))


@dataclass(slots=True, eq=False)
class Sequence:
    """A request of one prompt. `owner` and `request_id` name it to whoever asked; both together are unique."""

    request_id: str
    tokens: np.ndarray  # int32, known ones; out of date while the sequence is in a slot
    params: SamplingParams
    eos_ids: InitVar[frozenset[int]]
    seed: int
    max_model_len: int
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    grammar: TokenMatcher | None = None  # where it stands in the grammar that its output must match
    owner: int = 0
    asker: str = ""  # whose it is: those of one share their turns; "": nobody's in particular
    label: str = ""  # what whoever asked knows it by
    trace: str = ""  # of a span that it belongs to
    pooler: InitVar[Pooler | None] = None
    num_prompt: int = field(init=False)
    max_len: int = field(init=False)  # tokens at which it ends, whatever they are
    stop_ids: frozenset[int] = field(init=False)  # ids that end it, EOS included unless ignored
    logit_rules: LogitRules = field(init=False)
    prompt: PromptReads | None = field(init=False)
    order: int = -1  # of addition to the scheduler, breaks ties of priority and arrival
    prefix: Prefix = field(default_factory=Prefix)
    slot: int = -1  # also for a while after a preemption: until what was in flight has arrived
    state: State = State.WAITING
    finish_reason: str = ""
    stop_reason: int = -1
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    cache_miss: str = ""  # why no more of them were, one of `CACHE_MISSES`; "": it was all that can be
    num_preemptions: int = 0
    drafts: DraftCounts = field(default_factory=DraftCounts)
    times: Times = field(default_factory=Times)
    samples: Samples = field(default_factory=lambda: Samples(1))

    def __post_init__(self, eos_ids: frozenset[int], pooler: Pooler | None) -> None:
        params = self.params
        self.tokens = np.asarray(self.tokens, np.int32)  # never written to: sequences of a group share their prompt
        self.num_prompt = len(self.tokens)
        self.max_len = self.max_model_len
        if params.max_tokens is not None:
            self.max_len = min(self.num_prompt + params.max_tokens, self.max_model_len)
        eos = frozenset() if params.ignore_eos else eos_ids
        self.stop_ids = eos.union(params.stop_token_ids)
        self.logit_rules = LogitRules.of(params)
        self.prompt = PromptReads.of(params, pooler)

    @property
    def key(self) -> tuple[int, str]:
        """Unique among live sequences."""
        return self.owner, self.request_id

    @property
    def place(self) -> tuple[int, float, int]:
        """Sort key of the queue and of the running set, smaller first."""
        return self.priority, self.arrival, self.order

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far; out of date while the sequence is in a slot."""
        return len(self.tokens) - self.num_prompt

    @property
    def skip_reading_prefix_cache(self) -> bool:
        """Whether all of its prompt is to be computed: something is still to be told of tokens that may be cached."""
        reads = self.prompt
        if reads is None:
            return False
        owed = reads.num_logprobs is not None and reads.num_told < self.num_prompt - 1
        return owed or (reads.pooler is not None and reads.pooler.pooling != "last")

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


place_of = attrgetter("place")  # to sort by
