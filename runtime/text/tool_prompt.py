"""Tools for models whose chat template takes none: described in a system message, calls and results as plain text.

The words are ours; the form of calls is that of a row of `formats`, Hermes' unless another is chosen. Knows messages as
templates get them; knows no template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pagegraph.runtime.text.call_writer import write_calls
from pagegraph.runtime.text.formats import CallFormat

Message = dict[str, Any]

_TEXT = """\
You may call functions. They are, one a line, with JSON schemas of their parameters:
{tools}

A call names a function and gives its arguments, in exactly this form:
{example}
The result of a call comes between <tool_response> and </tool_response>. Call only these functions, and only where they \
help; otherwise answer in plain words."""


def with_tools(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], format: CallFormat, *, in_system: bool = True
) -> list[Message]:
    """The messages with tools, calls and results as text.

    The tools go into a system message, which is made if there is none, or, not `in_system`, into the first of a user.
    """
    plain: list[Message] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("role") == "tool":
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "tool", "content": result})
        else:
            plain.append(_as_text(message, format))
    plain = [message | {"role": "user"} if message["role"] == "tool" else message for message in plain]
    return _described(plain, tools, format, in_system) if tools else plain


def _as_text(message: Message, format: CallFormat) -> Message:
    """A message whose calls stand in its content."""
    if not (calls := message.get("tool_calls")):
        return message
    written = write_calls(format, [(call["function"]["name"], arguments_of(call)) for call in calls])
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": "\n".join(filter(None, (message.get("content"), written)))}


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call in a message; none where what stands there is no JSON object."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _described(messages: list[Message], tools: Sequence[Any], format: CallFormat, in_system: bool) -> list[Message]:
    text = _TEXT.format(
        tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools),
        example=write_calls(format, [("function_name", {"parameter": "value"})]),
    )
    role = "system" if in_system else "user"
    places = [index for index, message in enumerate(messages) if message.get("role") == role]
    if in_system and 0 not in places:
        return [{"role": "system", "content": text}, *messages]
    if not places:
        return [{"role": "user", "content": text}, *messages]
    at = places[0]
    content = f"{messages[at]['content']}\n\n{text}" if in_system else f"{text}\n\n{messages[at]['content']}"
    return [*messages[:at], messages[at] | {"content": content}, *messages[at + 1 :]]
