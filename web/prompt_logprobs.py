"""Log-probabilities of a prompt's tokens in the shapes that clients know: vLLM's and, for `echo`, OpenAI's.

Knows tokens and their text. Knows no choices, no chunks and no engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from pagegraph.runtime.ipc.protocol import PromptLogprobs, TokenDelta, TokenLogprob
from pagegraph.runtime.sampling_params import BadParameter, SamplingParams
from pagegraph.runtime.text.output import TextOutput
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.web.schema import GenerationRequest

MAX_ENTRIES = 1 << 21  # tokens with a log-probability in one answer that are its prompts': some 100 MB of JSON


class Echo(NamedTuple):
    """A prompt's tokens as part of an answer; the first has rank 0 and no log-probability, for nothing precedes it."""

    entries: list[TokenLogprob]
    offsets: list[int]  # where in the prompt's text that of each token begins


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's floor for an impossible token stands for it."""
    return max(logprob, -9999.0)


def check_size(checked: GenerationRequest, prompts: Iterable[Sequence[int]]) -> None:
    """Raise BadParameter where the prompts' log-probabilities would be too many for one answer."""
    if (wanted := checked.params.prompt_logprobs) is None:
        return
    tokens = checked.n * sum(map(len, prompts))
    if (wanted + 1) * tokens > MAX_ENTRIES:
        field = "logprobs" if checked.prompt_logprobs is None else "prompt_logprobs"
        raise BadParameter(
            field,
            f"is {wanted} for {tokens} prompt tokens, {(wanted + 1) * tokens} log-probabilities in one answer; at most"
            f" {MAX_ENTRIES}: send fewer prompts at a time, or ask for fewer",
        )


def entries_of(parts: Iterable[PromptLogprobs], prompt: Sequence[int]) -> Iterator[TokenLogprob]:
    """Of every token of the prompt but the first."""
    return itertools.chain.from_iterable(part.entries(prompt) for part in parts)


def echo_of(parts: Iterable[PromptLogprobs], prompt: Sequence[int], tokenizer: Tokenizer, skip_special: bool) -> Echo:
    """The prompt as the output of an empty one."""
    entries = [TokenLogprob(prompt[0], math.nan, 0), *entries_of(parts, prompt)]
    output = TextOutput(tokenizer, (), SamplingParams(), skip_special=skip_special)
    piece = output.add(TokenDelta("", list(prompt), "length", logprobs=entries))
    return Echo(piece.logprobs or [], piece.offsets)


def as_json(parts: Iterable[PromptLogprobs], prompt: Sequence[int], tokenizer: Tokenizer) -> msgspec.Raw:
    """vLLM's shape: null for the first token, then an object a token: id -> logprob, rank and text, its own id first.

    Encoded one by one: as objects a long prompt's would take many times the memory.
    """

    def row(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text}

    rows = [b"null"]
    for entry in entries_of(parts, prompt):
        by_id = {str(entry.token_id): row(entry.token_id, entry.logprob, entry.rank)}
        for place, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True)):
            by_id.setdefault(str(token_id), row(token_id, logprob, place + 1))
        rows.append(msgspec.json.encode(by_id))
    return msgspec.Raw(b"[" + b",".join(rows) + b"]")
