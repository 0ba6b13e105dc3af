"""Text completions as OpenAI's JSON, whole or in chunks: `echo`, log-probabilities of prompt and output, `best_of`.

Knows the shape of a choice. Knows no engine and no HTTP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from pagegraph.runtime.ipc.protocol import EngineInfo, TokenLogprob
from pagegraph.runtime.text.output import Piece
from pagegraph.web.prompt_logprobs import echo_of, finite
from pagegraph.web.responses import Choice, GenerationResponse
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.service import Service
from pagegraph.web.stream import Generation


class CompletionResponse(GenerationResponse):
    """`text_completion`, whole and streamed alike."""

    prefix = "cmpl-"
    object_whole = "text_completion"
    object_chunk = "text_completion"

    def __init__(
        self,
        checked: GenerationRequest,
        service: Service,
        info: EngineInfo,
        prompts: list[list[int]],
        generation: Generation,
    ) -> None:
        super().__init__(checked, service, info, prompts, generation)
        self._echo = checked.echo
        self._shows_logprobs = checked.shows_logprobs
        self._skip_special = checked.skip_special_tokens
        if self._echo:
            skip = checked.skip_special_tokens
            asked = prompts if checked.truncate_prompt_tokens is not None else checked.prompts
            texts = [one if isinstance(one, str) else self._tokenizer.decode(one, skip_special=skip) for one in asked]
            self._choices = [Choice(text, begin=len(text)) for text in texts for _ in range(checked.best_of)]
        # Choices of a stream whose prompts' log-probabilities are still to be sent.
        self._owed = set(range(len(self._choices))) if self._echo and self._shows_logprobs else set()

    def first(self) -> list[dict[str, Any]]:
        """The prompts' texts, where they are wanted and need not wait for log-probabilities."""
        if self._owed or not self._echo and self._prompt_ids is None:
            return []
        return [self._prompt_chunk(index, choice) for index, choice in enumerate(self._choices)]

    def events(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A chunk with text, log-probabilities and finish reason; before the first of them the prompt's, if it is owed."""
        wanted = self._prompt_ids is not None and piece.token_ids
        if not (piece.text or piece.logprobs or piece.finish_reason or wanted):
            return []
        chunks, begin = [], self._choices[index].begin
        if index in self._owed:
            self._owed.remove(index)
            chunks.append(self._prompt_chunk(index, self._with_prompt(index, self._choices[index])))
        choice = Choice(
            piece.text,
            piece.logprobs,
            [begin + at for at in piece.offsets],
            piece.token_ids,
            piece.finish_reason,
            piece.stop_reason,
        )
        return [*chunks, self._chunk([self.choice_json(index, choice)])]

    def _prompt_chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._chunk([self.choice_json(index, choice) | self._prompt_token_ids(index)])

    def _with_prompt(self, sequence: int, choice: Choice) -> Choice:
        """A choice with the log-probabilities of its prompt before its own; `sequence` is the one that told them."""
        prompt, parts = self._prompts[sequence // self._best_of], self._outputs[sequence].prompt_logprobs
        echo = echo_of(parts, prompt, self._tokenizer, self._skip_special)
        offsets = [min(at, choice.begin) for at in echo.offsets]
        return replace(choice, logprobs=echo.entries + (choice.logprobs or []), offsets=offsets + choice.offsets)

    def choice_json(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice with the text."""
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.logprobs, choice.offsets),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **self._token_ids(choice.token_ids),
        }

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed: for each prompt the n likeliest of its sequences."""
        choices = []
        for first in range(0, len(self._choices), self._best_of):
            own = self._choices[first : first + self._best_of]
            if self._best_of > self._n:
                own = sorted(own, key=lambda choice: -choice.mean_logprob)[: self._n]
            choices += [self._with_prompt(first, one) if self._owed else one for one in own]
        self._choices = choices
        body = super().whole()
        for choice in body["choices"]:
            choice |= self._prompt_token_ids(choice["index"]) | self._prompt_logprobs(choice["index"] // self._n)
        return body

    def _prompt_token_ids(self, index: int) -> dict[str, list[int]]:
        """The token ids of a choice's prompt, if they were asked for."""
        return {} if self._prompt_ids is None else {"prompt_token_ids": self._prompt_ids[index // self._n]}

    def _logprobs(self, entries: list[TokenLogprob] | None, offsets: list[int]) -> dict[str, Any] | None:
        """Parallel lists; `text_offset` is where in the choice's text that of the token begins."""
        if entries is None or not self._shows_logprobs:
            return None
        tokens = [self._token(entry.token_id) for entry in entries]
        chosen = [finite(entry.logprob) if entry.rank else None for entry in entries]
        # Encoded one by one: as objects those of a long prompt would take many times the memory.
        tops = [
            msgspec.Raw(msgspec.json.encode(self._likeliest(entry, token) if entry.rank else None))
            for entry, token in zip(entries, tokens, strict=True)
        ]
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _likeliest(self, entry: TokenLogprob, token: str) -> dict[str, float]:
        """The likeliest tokens in falling order, the sampled one (`token`, as text) among them; of equal texts one."""
        tops: dict[str, float] = {}
        for token_id, value in zip(entry.top_ids, entry.top_logprobs, strict=True):
            text = self._token(token_id)
            if text != token or token_id == entry.token_id:
                tops.setdefault(text, finite(value))
        tops.setdefault(token, finite(entry.logprob))
        return tops

    def _token(self, token_id: int) -> str:
        """A token as text; one that is not whole characters as its bytes, so that no two look the same."""
        if self._tokens_as_ids:
            return f"token_id:{token_id}"
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
