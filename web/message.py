"""The parts of an answer as OpenAI's message and as the deltas of one.

Knows the shapes of `reasoning`, `content`, `tool_calls` and `function_call`. Knows no tokens, choices or chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pagegraph.runtime.sampling_params import BadParameter, SamplingParams
from pagegraph.runtime.text.chat import Chat
from pagegraph.runtime.text.chat_output import CallArguments, CallBegin, ChatOutput, Content, Part, Reasoning
from pagegraph.runtime.text.output import Piece
from pagegraph.web.schema import GenerationRequest


class Message:
    """One message of an assistant while its text comes. `legacy`: the one call it may have is a `function_call`."""

    def __init__(self, output: ChatOutput, *, legacy: bool = False, shows_reasoning: bool = True) -> None:
        self._output = output
        self._legacy = legacy
        self._shows_reasoning = shows_reasoning
        self._texts: dict[type[Part], list[str]] = {Reasoning: [], Content: []}
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[list[str]] = []

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning so far."""
        return self._output.reasoning_tokens

    def parts(self, piece: Piece) -> Sequence[Part]:
        """What a piece brought, without reasoning that is not to be shown."""
        parts = self._output.add(piece.text, piece.ends)
        if piece.finish_reason:
            parts += self._output.finish()
        return parts if self._shows_reasoning else [part for part in parts if not isinstance(part, Reasoning)]

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the answer ended, as it is called of one with calls."""
        if reason == "stop" and self._output.num_calls:
            return "function_call" if self._legacy else "tool_calls"
        return reason

    def add(self, piece: Piece) -> None:
        """Take a piece into the whole message."""
        for part in self.parts(piece):
            if isinstance(part, CallBegin):
                self._calls.append(_call(part))
                self._arguments.append([])
            elif isinstance(part, CallArguments):
                self._arguments[part.index].append(part.text)
            else:
                self._texts[type(part)].append(part.text)

    def whole(self) -> dict[str, Any]:
        """The message of everything that was added."""
        content = "".join(self._texts[Content])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning := "".join(self._texts[Reasoning]):
            message |= _reasoning(reasoning)
        if not self._calls:
            return message
        for call, arguments in zip(self._calls, self._arguments, strict=True):
            call["function"]["arguments"] = "".join(arguments)
        calls = {"function_call": self._calls[0]["function"]} if self._legacy else {"tool_calls": self._calls}
        return message | {"content": content or None} | calls

    def delta(self, part: Part) -> dict[str, Any]:
        """One part as the delta of a chunk."""
        if isinstance(part, Content):
            return {"content": part.text}
        if isinstance(part, Reasoning):
            return _reasoning(part.text)
        if isinstance(part, CallBegin):
            call = _call(part)
            return (
                {"function_call": call["function"]} if self._legacy else {"tool_calls": [{"index": part.index} | call]}
            )
        function = {"arguments": part.text}
        if self._legacy:
            return {"function_call": function}
        return {"tool_calls": [{"index": part.index, "function": function}]}


def held(chat: Chat, checked: GenerationRequest, prompt_ids: Sequence[int]) -> SamplingParams:
    """The parameters of the answer to a chat's prompt, with the grammar that holds it to calls or to a structure.

    Raises BadParameter.
    """
    tools, params = checked.tools, checked.params
    try:
        structured = chat.grammar(
            prompt_ids,
            tools=tools.schemas,
            required=tools.choice == "required",
            parallel=tools.parallel and tools.named is None,
            structured=params.structured_outputs,
            strict=tools.strict,
            continued=_continued(checked),
        )
    except BadParameter as error:  # its field is the grammar's, of which the request knows nothing
        raise BadParameter(form_field(checked), f"would need a grammar that {error.problem}") from None
    if structured is params.structured_outputs:
        return params
    return msgspec.structs.replace(params, structured_outputs=structured)


def form_field(checked: GenerationRequest) -> str:
    """The field that asks for the form of the answer: where there is none of its own, it is that of the tools' calls."""
    if checked.params.structured_outputs is not None:
        return checked.form_field
    return "functions" if checked.tools.legacy else "tools"


def message_of(chat: Chat, checked: GenerationRequest, prompt_ids: Sequence[int]) -> Message:
    """The message that answers a chat's prompt."""
    tools = checked.tools
    output = chat.output(
        prompt_ids,
        tools=tools.schemas,
        single=not tools.parallel,
        held=tools.choice == "required",
        skip_special=checked.skip_special_tokens,
        continued=_continued(checked),
    )
    return Message(output, legacy=tools.legacy, shows_reasoning=checked.include_reasoning)


def _continued(checked: GenerationRequest) -> str | None:
    """The text of the message that the answer goes on with, if it does."""
    return checked.messages[-1]["content"] if checked.continue_final_message else None


def _call(part: CallBegin) -> dict[str, Any]:
    """A call that has no arguments yet."""
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}


def _reasoning(text: str) -> dict[str, str]:
    """Reasoning under both of its names: vLLM's, and DeepSeek's and SGLang's."""
    return {"reasoning": text, "reasoning_content": text}
