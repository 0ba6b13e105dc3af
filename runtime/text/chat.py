"""What a served model's answers hold: which formats its chat template means, and one `ChatOutput` for each answer.

Knows the tokenizer, for markers are often special tokens. Knows no requests and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagegraph.runtime.text.chat_output import ChatOutput
from pagegraph.runtime.text.formats import choose
from pagegraph.runtime.text.tokenizer import Tokenizer

_TAIL_TOKENS = 16  # of a prompt, in which the words that open or close reasoning are looked for


class Chat:
    """The formats of one model. `tool_call_parser`, `reasoning_parser`: names of rows, "auto" or "none"."""

    def __init__(self, tokenizer: Tokenizer, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> None:
        self.format = choose(tokenizer.chat_template or "", tool_call_parser, reasoning_parser)
        self._tokenizer = tokenizer
        self._special = {tokenizer.token_bytes(id).decode("utf-8", "replace"): id for id in tokenizer.special_ids}

    def kept_ids(self, tools: bool) -> frozenset[int]:
        """Special tokens that have to be text for `output`, whether calls are looked for or not."""
        return frozenset(self._special[text] for text in self._markers(tools))

    def output(
        self,
        prompt_ids: Sequence[int],
        *,
        tools: Mapping[str, Any] | None = None,
        single: bool = False,
        skip_special: bool = True,
        continued: str | None = None,
    ) -> ChatOutput:
        """For the answer to this prompt; arguments as in `ChatOutput`. `continued`: the message that it goes on with."""
        return ChatOutput(
            self.format,
            tools=tools,
            opened=self._opened(prompt_ids, continued),
            hidden=self._markers(tools is not None) if skip_special else (),
            single=single,
        )

    def _opened(self, prompt_ids: Sequence[int], continued: str | None) -> bool:
        """Whether the prompt ends inside reasoning."""
        reasoning = self.format.reasoning
        if reasoning is None or self.format.is_harmony:
            return False
        if continued is not None:
            return continued.rfind(reasoning.begin) > continued.rfind(reasoning.end)
        tail = self._tokenizer.decode(prompt_ids[-_TAIL_TOKENS:], skip_special=False).rstrip()
        return tail.endswith(reasoning.begin) or (reasoning.assumed and not tail.endswith(reasoning.end))

    def _markers(self, tools: bool) -> list[str]:
        words = self.format.words(tools)
        return [text for text in self._special if text and any(text in word for word in words)]
