"""How models write reasoning and tool calls: one row a format, and which row a chat template means.

A row is data: the words around reasoning, around all calls and around one, and how a call's name and arguments are
written. `chat_output` and `call_reader` read by it. Names are vLLM's where it has one.

White space between the words of a row is free in what a model writes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ReasoningFormat:
    """The words around reasoning, with which an answer begins."""

    name: str
    signs: tuple[str, ...]
    begin: str
    end: str


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """How calls are written.

    `section_begin` and `section_end` stand around all calls, `begin` and `end` around each, `between` between two. What
    a call holds, by `style`:

    object      a JSON object with the name and, as `arguments_key`, the arguments
    named       the name, `name_end`, the arguments as a JSON object
    parameters  the name, `name_end`, each argument as `key_begin` key `key_end` value `value_end`
    literals    the name and the arguments in brackets, in words much like JSON's: `quote` stands around strings,
                or they are Python's
    harmony     messages with a header each, as gpt-oss writes them; nothing else of the row is used

    `bare`: the calls may begin an answer with this character, without `section_begin`'s first word; then only names of
    tools that the request has make a call. `listed`: how calls are written if a list stands behind `begin`.
    """

    name: str
    signs: tuple[str, ...]
    style: Literal["object", "named", "parameters", "literals", "harmony"]
    section_begin: tuple[str, ...] = ()
    section_end: tuple[str, ...] = ()
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    between: str = ""
    arguments_key: str = "arguments"
    name_end: tuple[str, ...] = ()
    key_begin: str = ""
    key_end: tuple[str, ...] = ()
    value_end: str = ""
    quote: str = ""
    bare: str = ""
    listed: CallFormat | None = None
    ids: Literal["call", "nine"] = "call"  # call_ and hexadecimal digits, or nine letters and digits


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a model writes reasoning, and calls; None where it writes none."""

    reasoning: ReasoningFormat | None = None
    calls: CallFormat | None = None

    def words(self, tools: bool) -> list[str]:
        """All words of the rows that are read, those of calls only with `tools`."""
        words = [] if self.reasoning is None else [self.reasoning.begin, self.reasoning.end]
        rows = [row for row in (self.calls, self.calls and self.calls.listed) if row and tools]
        for row in rows:
            for value in (getattr(row, field.name) for field in fields(row)):
                words += value if isinstance(value, tuple) else [value] if isinstance(value, str) else []
        return [word.strip() for word in words]


REASONING = {row.name: row for row in (
    ReasoningFormat(name="qwen3", signs=("</think>",), begin="<think>", end="</think>"),
)}  # fmt: skip

CALLS = {row.name: row for row in (
    CallFormat(name="hermes", signs=("<tool_call>",), style="object", begin=("<tool_call>\n",), end=("\n</tool_call>",), between="\n"),
)}  # fmt: skip


def choose(template: str, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> ChatFormat:
    """The rows of these names; for "auto" those whose words stand in the text of the chat template."""
    return ChatFormat(
        reasoning=_row(REASONING, reasoning_parser, template), calls=_row(CALLS, tool_call_parser, template)
    )


def _row(rows: dict[str, Any], name: str, template: str) -> Any:
    if name != "auto":
        return None if name == "none" else rows[name]
    return next((row for row in rows.values() if all(sign in template for sign in row.signs)), None)
