"""What a served model's answers hold: which formats its chat template means, and one `ChatOutput` for each answer.

Knows the tokenizer, for markers are often special tokens. Knows no requests and no HTTP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pagegraph.runtime.structured_output import StructuredOutputs, lark_string
from pagegraph.runtime.text.answer_grammar import ANY_ARGUMENTS, AnswerGrammar, Thought
from pagegraph.runtime.text.chat_output import ChatOutput
from pagegraph.runtime.text.chat_template import ChatTemplateError, Message
from pagegraph.runtime.text.formats import CALLS, choose
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.runtime.text.tool_prompt import with_tools

_TAIL_TOKENS = 16  # of a prompt, in which the words that open or close reasoning are looked for


class Chat:
    """The formats of one model. `tool_call_parser`, `reasoning_parser`: names of rows, "auto" or "none"."""

    def __init__(self, tokenizer: Tokenizer, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> None:
        format = choose(tokenizer.chat_template or "", tool_call_parser, reasoning_parser)
        # Whether the template itself takes tools, in a format that is known.
        self._native = format.calls is not None and self._in_template(tokenizer, "tools")
        if format.calls is None and tool_call_parser == "auto":
            format = replace(format, calls=CALLS["hermes"])
        self.format = format
        self._tokenizer = tokenizer
        # Tokens of which the words of the rows are made, by their text: all added ones, and special ones by whether
        # calls are looked for.
        self._added = _tokens(tokenizer, tokenizer.added_ids, format.words(tools=True))
        self._markers = {
            tools: _tokens(tokenizer, tokenizer.special_ids, format.words(tools)) for tools in (False, True)
        }
        self._added_pattern = f"({'|'.join(map(re.escape, sorted(self._added, key=len, reverse=True))) or '(?!)'})"

    def reads(self, name: str) -> bool:
        """Whether the chat template reads a variable of this name."""
        return self._in_template(self._tokenizer, name)

    def render(self, messages: list[Message], *, tools: list[dict[str, Any]], **options: Any) -> str:
        """The prompt; `options` are those of `Tokenizer.render_chat`.

        Messages are OpenAI's, with the arguments of tool calls as JSON text. Raises ChatTemplateError.
        """
        called = any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)
        if not tools and not called:
            return self._tokenizer.render_chat(messages, **options)
        format = self.format.calls
        if format is None:
            raise ChatTemplateError("tools are not read here: the server was started with tool_call_parser none")
        if self._native:
            names = {call["id"]: call["function"]["name"] for one in messages for call in one.get("tool_calls") or ()}
            messages = [_with_name(message, names) for message in messages]
            if format.ids == "nine":
                messages = list(map(_with_short_ids, messages))
            rendered = self._tokenizer.render_chat(messages, tools=tools or None, **options)
            for tool in tools:
                if (name := tool["function"]["name"]) not in rendered:
                    raise ChatTemplateError(f"the model's chat template leaves out the tool {name}")
            return rendered
        try:
            return self._tokenizer.render_chat(with_tools(messages, tools, format), **options)
        except ChatTemplateError:
            if not tools:
                raise
        return self._tokenizer.render_chat(with_tools(messages, tools, format, in_system=False), **options)

    @staticmethod
    def _in_template(tokenizer: Tokenizer, name: str) -> bool:
        return tokenizer.template is not None and name in tokenizer.template.variables

    def grammar(
        self,
        prompt_ids: Sequence[int],
        *,
        tools: Mapping[str, Any] | None,
        required: bool,
        parallel: bool,
        structured: StructuredOutputs | None,
        strict: Collection[str] = (),
        continued: str | None = None,
    ) -> StructuredOutputs | None:
        """What holds an answer to this prompt to calls, if they are `required`, or to a structure, or to either.

        If it may be any text, what is held are calls of the tools in `strict`, where a format lets calls be told from
        text: by a special token.
        """
        any_text = tools is not None and not required and structured is None
        if any_text and not self._can_be_strict(tools or {}, strict):
            return None
        if tools is None and (structured is None or self.format.reasoning is None):
            return structured
        grammar = AnswerGrammar(self.format, self._literal, self._thought(prompt_ids, continued))
        answers = []
        if tools is not None:
            loose = [name for name in tools if any_text and name not in strict]
            calls = grammar.calls({**tools, **dict.fromkeys(loose, ANY_ARGUMENTS)}, parallel)
            answers = ["TEXT?", f"TEXT? {calls}"] if any_text else [calls]
        if structured is not None and not required:
            answers.append(grammar.text(structured))
        return StructuredOutputs(grammar=grammar.whole(answers))

    def _can_be_strict(self, tools: Mapping[str, Any], strict: Collection[str]) -> bool:
        calls = self.format.calls
        if calls is None or self.format.is_harmony or not strict:
            return False
        first = next(iter((*calls.section_begin, *calls.begin)), "")
        whole = calls.style in ("object", "named") or all(name in strict for name in tools)
        return not calls.bare and whole and self._literal(first).startswith("<[")

    def kept_ids(self, tools: bool) -> frozenset[int]:
        """Special tokens that have to be text for `output`, whether calls are looked for or not."""
        return frozenset(self._markers[tools].values())

    def output(
        self,
        prompt_ids: Sequence[int],
        *,
        tools: Mapping[str, Any] | None = None,
        single: bool = False,
        held: bool = False,
        skip_special: bool = True,
        continued: str | None = None,
    ) -> ChatOutput:
        """For the answer to this prompt; arguments as in `ChatOutput`. `continued`: the message that it goes on with."""
        return ChatOutput(
            self.format,
            tools=tools,
            opened=self._thought(prompt_ids, continued) == "open",
            hidden=[*self._markers[tools is not None]] if skip_special else (),
            single=single,
            held=held,
        )

    def _thought(self, prompt_ids: Sequence[int], continued: str | None) -> Thought:
        """Whether the prompt ends inside reasoning, behind it, or says nothing of it."""
        row = self.format.reasoning
        if row is None or self.format.is_harmony:
            return "free"
        if continued and continued.strip():
            return "open" if continued.rfind(row.begin) > continued.rfind(row.end) else "closed"
        tail = self._tokenizer.decode(prompt_ids[-_TAIL_TOKENS:], skip_special=False).rstrip()
        if tail.endswith(row.end):
            return "closed"
        return "open" if row.assumed or tail.endswith(row.begin) else "free"

    def _literal(self, text: str) -> str:
        """A text as symbols of Lark: added tokens among its characters as such, for so the model has learnt them."""
        pieces = re.split(self._added_pattern, text)
        return " ".join(f"<[{self._added[one]}]>" if one in self._added else lark_string(one) for one in pieces if one)


def _tokens(tokenizer: Tokenizer, ids: Iterable[int], words: Sequence[str]) -> dict[str, int]:
    """Those of the ids whose text stands in one of the words, by it."""
    texts = {tokenizer.token_bytes(id).decode("utf-8", "replace"): id for id in ids}
    return {text: id for text, id in texts.items() if text.strip() and any(text in word for word in words)}


def _with_name(message: Message, names: Mapping[str, str]) -> Message:
    """A tool's result with the name of the tool, which some templates show."""
    if message.get("role") != "tool" or message.get("name"):
        return message
    name = names.get(message.get("tool_call_id", ""))
    return message if name is None else message | {"name": name}


def _with_short_ids(message: Message) -> Message:
    """Ids of calls as Mistral's templates want them: nine letters and digits."""
    if message.get("role") == "tool" and message.get("tool_call_id"):
        return message | {"tool_call_id": _short(message["tool_call_id"])}
    if calls := message.get("tool_calls"):
        return message | {"tool_calls": [call | {"id": _short(call["id"])} for call in calls]}
    return message


def _short(id: str) -> str:
    return id if re.fullmatch("[A-Za-z0-9]{9}", id) else hashlib.sha256(id.encode()).hexdigest()[:9]
