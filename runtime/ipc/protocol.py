"""Messages between the web processes and the engine, typed and encoded as msgpack by msgspec.

Knows no sockets and no torch. Decoding is strict: a frame that is not one of these types raises
`msgspec.DecodeError` or `msgspec.ValidationError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from pagegraph.runtime.askers import NOBODY, Asker
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.sampling_params import SamplingParams

MAX_FRAME_BYTES = 64 << 20  # a longer frame ends the connection of whoever sent it
HEARTBEAT_S = 1.0  # between two Hellos of a web process, which the engine answers
SILENCE_S = 10.0  # without a message of the other end, after which it counts as gone


class Submit(msgspec.Struct, frozen=True, tag="submit", kw_only=True, omit_defaults=True):
    """Start one sequence. `request_id` is chosen by the web process, unique among live ones."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first
    cache_salt: str = ""
    asker: Asker = NOBODY
    label: str = ""
    trace: str = ""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One sequence of a group: `prompt` is an index into the group's prompts."""

    request_id: str
    prompt: int
    params: SamplingParams


class SubmitGroup(msgspec.Struct, frozen=True, tag="submit_group", kw_only=True, omit_defaults=True):
    """Start several sequences, all of them or none. A prompt that several of them have travels once."""

    prompts: list[list[int]]
    members: list[Member]
    priority: int = 0
    cache_salt: str = ""
    asker: Asker = NOBODY
    label: str = ""  # what the client knows the request by
    trace: str = ""  # W3C's traceparent of a span; "": what becomes of the sequences is not told to who follows spans
    taken: bool = False  # an engine that ended had admitted it: it is not refused for a full queue now

    def __post_init__(self) -> None:
        if not self.members or not all(0 <= member.prompt < len(self.prompts) for member in self.members):
            raise ValueError("a group needs sequences, and each of them a prompt that is there")

    def each(self) -> list[Submit]:
        """Its sequences, as if they came one by one; equal prompts are the same list."""
        return [
            Submit(
                request_id=member.request_id,
                token_ids=self.prompts[member.prompt],
                params=member.params,
                priority=self.priority,
                cache_salt=self.cache_salt,
                asker=self.asker,
                label=self.label,
                trace=self.trace,
            )
            for member in self.members
        ]


class Abort(msgspec.Struct, frozen=True, tag="abort", omit_defaults=True):
    """Stop a sequence and free its blocks; an unknown id is ignored.

    `finish_reason` is what the sequence counts as: "stop" where whoever reads its text found a stop string, "abort"
    where nobody wants it any more.
    """

    request_id: str
    finish_reason: Literal["abort", "stop"] = "abort"


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A web process asks what the engine serves; answered by `EngineInfo`. Also its heartbeat."""


class ListRecent(msgspec.Struct, frozen=True, tag="list_recent"):
    """A web process asks what became of the last sequences of one asker; answered by `Recent`."""

    asker: str


class WatchCache(msgspec.Struct, frozen=True, tag="watch_cache"):
    """A web process that chooses among engines asks to be told of the prefix cache: all that it holds, then each change."""


class CacheChanged(msgspec.Struct, frozen=True, tag="cache_changed", omit_defaults=True):
    """What became of an engine's prefix cache since the last of these, and what the engine has to do.

    `stored` and `removed` are hashes (`runtime.scheduler.block_hashes`); of `cleared` nothing but `stored` is there. What is
    to do counts every group that was `Admitted` before this message.
    """

    cleared: bool = False
    stored: list[bytes] = []
    removed: list[bytes] = []
    num_requests: int = 0  # sequences that run or wait
    num_prompt_tokens: int = 0  # of theirs that are not computed


class Timeline(msgspec.Struct, frozen=True, tag="timeline", kw_only=True):
    """What became of one sequence that has ended, and when, in seconds of the machine's monotonic clock.

    Sent for each with a `trace`. NaN: it ended before that.
    """

    label: str
    trace: str
    prompt_tokens: int
    cached_tokens: int
    cache_miss: str  # as `TokenDelta` has it
    generated_tokens: int
    finish_reason: str
    arrival: float
    launched: float  # of its first step
    first_token: float
    ended: float


class Recent(msgspec.Struct, frozen=True, tag="recent"):
    """The last sequences of one asker that ended, the newest last."""

    asker: str
    timelines: list[Timeline]


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability and rank of the sampled token, and the likeliest tokens in falling order.

    Of equally likely tokens the sampled one comes first.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of consecutive prompt tokens: arrays of R and [R, n] in the machine's own bytes.

    `first` is the position of the first of them; the token at position 0 has none. Of the likeliest tokens, in falling
    order, n come for each.
    """

    first: int
    logprobs: bytes  # float32
    ranks: bytes  # int32
    top_ids: bytes  # int32
    top_logprobs: bytes  # float32

    def __len__(self) -> int:
        return len(self.ranks) // 4

    def entries(self, token_ids: Sequence[int]) -> Iterator[TokenLogprob]:
        """One an entry; `token_ids` are the whole prompt's."""
        logprobs: memoryview[float] = memoryview(self.logprobs).cast("f")
        values: memoryview[float] = memoryview(self.top_logprobs).cast("f")
        ranks, ids = memoryview(self.ranks).cast("i"), memoryview(self.top_ids).cast("i")
        num = len(ids) // max(len(self), 1)
        for index, (logprob, rank) in enumerate(zip(logprobs, ranks)):
            token_id, at = token_ids[self.first + index], slice(index * num, (index + 1) * num)
            yield TokenLogprob(token_id, logprob, rank, with_chosen(token_id, rank, ids[at].tolist()), [*values[at]])


def with_chosen(token_id: int, rank: int, top_ids: list[int]) -> list[int]:
    """The likeliest tokens, in falling order, with the chosen one of this rank first among equals: it does not fall out."""
    if rank > len(top_ids):
        return top_ids
    others = [one for one in top_ids[rank - 1 :] if one != token_id]
    return [*top_ids[: rank - 1], token_id, *others][: len(top_ids)]


class TokenDelta(msgspec.Struct, array_like=True, gc=False):
    """What one step brought one sequence.

    `finish_reason`: "" while running, else "stop", "length", "abort" or "error".
    `stop_reason`: the stop token id that matched, or -1.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str = ""
    stop_reason: int = -1
    cached_tokens: int = 0  # prompt tokens served from the prefix cache; told with the first and the last token
    logprobs: list[TokenLogprob] | None = None
    # Draft tokens of the sequence so far that became its own, and those that did not; told with every step that had some.
    accepted: int = 0
    rejected: int = 0
    prompt_logprobs: PromptLogprobs | None = None  # in order, all of them before the first token
    embedding: bytes = b""  # of the prompt, float32 in the machine's own bytes; told at the end
    cache_miss: str = ""  # why no more of the prompt was cached, one of `CACHE_MISSES`; told as `cached_tokens` is


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """What one step brought one web process, each sequence once.

    A sequence that got one token and goes on is an entry of the two lists; `deltas` holds all others.
    """

    deltas: list[TokenDelta] = []
    request_ids: list[str] = []
    token_ids: list[int] = []  # token i belongs to request_ids[i]

    def each(self) -> Iterator[TokenDelta]:
        """All of it as deltas."""
        yield from self.deltas
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            yield TokenDelta(request_id, [token_id])


class Quota(msgspec.Struct, frozen=True, array_like=True):
    """Of one limit a minute: what is left of it, and the seconds until all of it is, if nothing more is asked."""

    limit: int
    remaining: int
    reset_s: float


class Quotas(msgspec.Struct, frozen=True, array_like=True):
    """What a key has left; None of a limit that it has not."""

    requests: Quota | None = None
    tokens: Quota | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A sequence that cannot run: `status` is the HTTP status (400, 429, 500 or 503), `message` is for the user.

    `others` are those of its group, where it was the group that was refused: none of them runs. `field`: of SamplingParams,
    or what else of the request is at fault, as the message has it; empty if no one is. `retry_after_s`: when to ask again, of
    429 and 503. `quotas`: of the key, of 429.
    """

    request_id: str
    status: int
    message: str
    others: list[str] = []
    field: str = ""
    retry_after_s: float = 1.0
    quotas: Quotas | None = None


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """The engine admits the group of this first sequence: it is not refused any more. Comes before its first token."""

    request_id: str
    quotas: Quotas | None = None  # of the key that asked, this request counted; None where it has no limit


class EngineInfo(msgspec.Struct, frozen=True, tag="info"):
    """Facts of the running engine that web processes show and check requests against."""

    model: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    compile_state: Literal["off", "compiling", "compiled", "failed"]  # uncompiled steps run in all but "compiled"
    draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    sampling_defaults: dict[str, int | float] = {}  # fields of SamplingParams that the model itself sets for requests
    pooler: Pooler = Pooler(0, refused="the engine does not say")
    stalled_s: float = 0.0  # seconds since a step ended or work came to an idle engine; 0 without work


ToEngine = Submit | SubmitGroup | Abort | Hello | ListRecent | WatchCache
ToClient = Admitted | Tokens | Failed | EngineInfo | Timeline | Recent | CacheChanged

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_client = msgspec.msgpack.Decoder(ToClient)


def encode(message: ToEngine | ToClient) -> bytes:
    """Message to one msgpack frame."""
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Frame to a message for the engine; raises msgspec.DecodeError on anything else."""
    return _to_engine.decode(frame)


def decode_to_client(frame: bytes) -> ToClient:
    """Frame to a message for a web process; raises msgspec.DecodeError on anything else."""
    return _to_client.decode(frame)
