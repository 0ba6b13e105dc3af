"""Generated text as OpenAI's JSON: what chat completions and text completions share, and chat completions.

Knows the shapes of answers. Knows no engine, no fields of requests beyond those that change an answer, and no HTTP.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from pagegraph.runtime.ipc.protocol import EngineInfo, TokenLogprob
from pagegraph.runtime.text.output import Piece
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.web.cache_miss import cache_miss
from pagegraph.web.errors import ApiError
from pagegraph.web.message import message_of
from pagegraph.web.prompt_logprobs import as_json, finite
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.service import Service
from pagegraph.web.stream import DONE, KEEP_ALIVE, Generation, sse


@dataclass(slots=True)
class Choice:
    """One choice of a response that is not streamed."""

    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    offsets: list[int] = field(default_factory=list)  # where in `text` that of each begins
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    begin: int = 0  # characters of the prompt that stand before the output

    @property
    def mean_logprob(self) -> float:
        """Of the output's tokens."""
        entries = self.logprobs or []
        return sum(entry.logprob for entry in entries) / max(len(entries), 1)


class GenerationResponse:
    """One response in OpenAI's JSON, streamed or whole; the subclasses differ in what a choice looks like."""

    prefix: str
    object_whole: str
    object_chunk: str
    encode = staticmethod(sse)
    end = DONE
    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        checked: GenerationRequest,
        service: Service,
        info: EngineInfo,
        prompts: list[list[int]],
        generation: Generation,
    ) -> None:
        self._head = {
            "id": f"{self.prefix}{checked.request_id or uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.served_model_name,
            "system_fingerprint": _fingerprint(info),
        }
        self._tokenizer = service.tokenizer
        self._include_usage = checked.include_usage
        self._continuous_usage = checked.continuous_usage
        self._n, self._best_of = checked.n, checked.best_of
        self._prompts = prompts
        self._shows_prompt_logprobs = checked.prompt_logprobs is not None
        self._tokens_as_ids = checked.tokens_as_token_ids
        self._prompt_ids = prompts if checked.return_token_ids else None  # and those of the output
        self._num_prompt_tokens = sum(map(len, prompts))
        self._outputs = generation.outputs
        self._choices = [Choice() for _ in generation.outputs]

    def add(self, index: int, piece: Piece) -> None:
        """Take one piece of a sequence into the whole response."""
        choice = self._choices[index]
        choice.text += piece.text
        choice.token_ids += piece.token_ids
        if piece.logprobs is not None:
            choice.logprobs = choice.logprobs or []
            choice.logprobs += piece.logprobs
            choice.offsets += [choice.begin + at for at in piece.offsets]
        if piece.finish_reason:
            choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        choices = [self.choice_json(index, choice) for index, choice in enumerate(self._choices)]
        return {
            **self._head,
            "object": self.object_whole,
            "choices": choices,
            "usage": self._usage(),
            **self._cache_miss(),
        }

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any token."""
        return []

    def events(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Chunks of one piece; none when all its text is held back."""
        raise NotImplementedError

    def last(self) -> list[dict[str, Any]]:
        """Chunks after every sequence has ended."""
        return [self._chunk([], usage=self._usage())] if self._include_usage else []

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """What a stream ends with in place of `last`."""
        return [error.body()]

    def choice_json(self, index: int, choice: Choice) -> dict[str, Any]:
        """One choice of the whole response."""
        raise NotImplementedError

    def _token_ids(self, token_ids: list[int]) -> dict[str, list[int]]:
        """The output's token ids as a choice has them, if they were asked for."""
        return {} if self._prompt_ids is None else {"token_ids": token_ids}

    def _prompt_logprobs(self, prompt: int) -> dict[str, Any]:
        """What the prompt's first sequence told of it, if it was asked for."""
        if not self._shows_prompt_logprobs:
            return {}
        parts = self._outputs[prompt * self._best_of].prompt_logprobs
        return {"prompt_logprobs": as_json(parts, self._prompts[prompt], self._tokenizer)}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.object_chunk, "choices": choices}
        if self._continuous_usage:
            usage = self._usage()
        if not self._include_usage:
            return chunk
        return {**chunk, "usage": usage, **({} if usage is None else self._cache_miss())}

    def _usage(self) -> dict[str, Any]:
        completion = sum(output.num_tokens for output in self._outputs)
        cached = sum(output.cached_tokens for output in self._outputs[:: self._best_of])
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "reasoning_tokens": self._num_reasoning_tokens(),
                "accepted_prediction_tokens": sum(output.accepted for output in self._outputs),
                "rejected_prediction_tokens": sum(output.rejected for output in self._outputs),
            },
        }

    def _cache_miss(self) -> dict[str, str]:
        return cache_miss(self._outputs[:: self._best_of])

    def _num_reasoning_tokens(self) -> int:
        return 0


class ChatResponse(GenerationResponse):
    """`chat.completion` and its chunks."""

    prefix = "chatcmpl-"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def __init__(
        self,
        checked: GenerationRequest,
        service: Service,
        info: EngineInfo,
        prompts: list[list[int]],
        generation: Generation,
    ) -> None:
        super().__init__(checked, service, info, prompts, generation)
        self._messages = [message_of(service.chat, checked, prompts[0]) for _ in generation.outputs]

    def add(self, index: int, piece: Piece) -> None:
        """Take one piece of a sequence into the whole response."""
        super().add(index, piece)
        self._messages[index].add(piece)

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        return super().whole() | self._prompt_token_ids() | self._prompt_logprobs(0)

    def first(self) -> list[dict[str, Any]]:
        """The role of every choice."""
        chunks = []
        for index in range(len(self._choices)):
            choice = self._chunk_choice(index, {"role": "assistant", "content": ""}) | self._token_ids([])
            chunks.append(self._chunk([choice]) | self._prompt_token_ids())
        return chunks

    def events(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A chunk with text and log-probabilities, then one with the finish reason."""
        message, events = self._messages[index], []
        ids, logprobs = self._token_ids(piece.token_ids), self._logprobs(piece.logprobs)
        deltas = list(map(message.delta, message.parts(piece)))
        if not deltas and (piece.logprobs or (ids and piece.token_ids)):
            deltas = [{"content": ""}]  # tokens whose text is held back
        for delta in deltas:
            events.append(self._chunk([self._chunk_choice(index, delta, logprobs) | ids]))
            ids, logprobs = self._token_ids([]), None
        if piece.finish_reason:
            end = self._chunk_choice(index, {}) | self._token_ids([])
            end |= {"finish_reason": message.finish_reason(piece.finish_reason), "stop_reason": piece.stop_reason}
            events.append(self._chunk([end]))
        return events

    def choice_json(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice with the whole message."""
        return {
            "index": index,
            "message": self._messages[index].whole(),
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": self._messages[index].finish_reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
            **self._token_ids(choice.token_ids),
        }

    def _num_reasoning_tokens(self) -> int:
        return sum(message.reasoning_tokens for message in self._messages)

    def _prompt_token_ids(self) -> dict[str, list[int]]:
        """The prompt's token ids, if they were asked for."""
        return {} if self._prompt_ids is None else {"prompt_token_ids": self._prompt_ids[0]}

    def _chunk_choice(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, entries: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        return {"content": token_entries(self._tokenizer, entries, self._tokens_as_ids), "refusal": None}


def token_entries(tokenizer: Tokenizer, entries: list[TokenLogprob], as_ids: bool = False) -> list[dict[str, Any]]:
    """Log-probabilities as chat completions and responses write them: tokens as text and bytes."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        token = f"token_id:{token_id}" if as_ids else data.decode("utf-8", "replace")
        return {"token": token, "logprob": finite(logprob), "bytes": list(data)}

    return [
        {
            **entry(one.token_id, one.logprob),
            "top_logprobs": [entry(*top) for top in zip(one.top_ids, one.top_logprobs, strict=True)],
        }
        for one in entries
    ]


def model_card(service: Service) -> dict[str, Any]:
    card = {
        "id": service.settings.served_model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "pagegraph",
    }
    return {**card, "max_model_len": service.engine.info().max_model_len}


def _fingerprint(info: EngineInfo) -> str:
    """Equal for equal model, number format and device kind: what decides the tokens of a seed."""
    facts = f"{info.model} {info.dtype} {info.device} {info.compile_state == 'compiled'}"
    return "fp_" + hashlib.sha256(facts.encode()).hexdigest()[:12]
