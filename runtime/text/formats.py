"""How models write reasoning and tool calls: one row a format, and which row a chat template means.

A row is data: the words around reasoning, around all calls and around one, and how a call's name and arguments are
written. `chat_output` and `call_reader` read by it. Names are vLLM's where it has one.

White space between the words of a row is free in what a model writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pagegraph.runtime.text import harmony


@dataclass(frozen=True, kw_only=True)
class ReasoningFormat:
    """The words around reasoning, with which an answer begins.

    `assumed`: an answer that begins with neither is inside reasoning, unless the prompt has closed it.
    """

    name: str
    models: str  # whose it is, for people
    signs: tuple[str, ...]  # a template that holds all of them means this row
    begin: str
    end: str
    assumed: bool = False


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """How calls are written.

    `section_begin` and `section_end` stand around all calls, `begin` and `end` around each, `between` between two. What
    a call holds, by `style`:

    object      a JSON object with the name and, as `arguments_key`, the arguments
    named       the name, `name_end`, the arguments as a JSON object; an id of the model's own may come behind `id_begin`
    parameters  the name, `name_end`, each argument as `key_begin` key `key_end` value `value_end`
    literals    the name and the arguments in brackets, in words much like JSON's: `quote` stands around strings,
                or they are Python's
    harmony     messages with a header each, which `harmony` reads

    `bare`: the calls may begin an answer with this character, without `section_begin`'s first word; then only names of
    tools that the request has make a call. `listed`: how calls are written if a list stands behind `begin`.
    """

    name: str
    models: str
    signs: tuple[str, ...]
    style: Literal["object", "named", "parameters", "literals", "harmony"]
    section_begin: tuple[str, ...] = ()
    section_end: tuple[str, ...] = ()
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    between: str = ""
    arguments_key: str = "arguments"
    name_end: tuple[str, ...] = ()
    id_begin: str = ""
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

    @property
    def is_harmony(self) -> bool:
        """Whether answers are messages with headers."""
        return self.reasoning is HARMONY or (self.calls is not None and self.calls.style == "harmony")

    def words(self, tools: bool) -> list[str]:
        """All words of the rows that are read, those of calls only with `tools`."""
        if self.is_harmony:
            return list(harmony.WORDS)
        words = [] if self.reasoning is None else [self.reasoning.begin, self.reasoning.end]
        for row in (self.calls, self.calls and self.calls.listed):
            if row and tools:
                words += [*row.section_begin, *row.section_end, *row.begin, *row.end, *row.name_end, *row.key_end]
                words += [row.id_begin, row.key_begin, row.value_end, row.quote]
        return [word.strip() for word in words if word.strip()]


HARMONY = ReasoningFormat(name="openai", models="gpt-oss", signs=("<|channel|>", "<|message|>"), begin="", end="")

REASONING = {row.name: row for row in (
    HARMONY,
    ReasoningFormat(name="mistral", models="Magistral", signs=("[THINK]",), begin="[THINK]", end="[/THINK]"),
    ReasoningFormat(name="gemma4", models="Gemma 4", signs=("<|channel>",), begin="<|channel>thought", end="<channel|>"),
    ReasoningFormat(
        name="granite", models="Granite 3.2", signs=("Here is my thought process:",),
        begin="Here is my thought process:", end="Here is my response:",
    ),
    ReasoningFormat(
        name="seed_oss", models="Seed-OSS", signs=("<seed:think>",), begin="<seed:think>", end="</seed:think>"),
    ReasoningFormat(
        name="deepseek_r1", models="DeepSeek-R1, V3.1", signs=("\uff5cAssistant\uff5c", "</think>"),
        begin="<think>", end="</think>", assumed=True,
    ),
    ReasoningFormat(
        name="qwen3", models="Qwen3, GLM-4.5, SmolLM3 and most others", signs=("</think>",),
        begin="<think>", end="</think>",
    ),
)}  # fmt: skip

_MISTRAL_LIST = CallFormat(
    name="mistral-list", models="Mistral before 2025", signs=(), style="object",
    section_begin=("[TOOL_CALLS]", "["), section_end=("]",), between=", ", ids="nine",
)  # fmt: skip

CALLS = {row.name: row for row in (
    CallFormat(name="openai", models="gpt-oss", signs=("<|channel|>", "<|message|>"), style="harmony"),
    CallFormat(
        name="mistral", models="Mistral", signs=("[TOOL_CALLS]",), style="named",
        begin=("[TOOL_CALLS]",), name_end=("[ARGS]",), id_begin="[CALL_ID]", listed=_MISTRAL_LIST, ids="nine",
    ),
    CallFormat(
        name="deepseek_v3", models="DeepSeek-V3, R1", signs=("<\uff5ctool\u2581sep\uff5c>", "```json"), style="named",
        section_begin=("<\uff5ctool\u2581calls\u2581begin\uff5c>",), section_end=("<\uff5ctool\u2581calls\u2581end\uff5c>",),
        begin=("<\uff5ctool\u2581call\u2581begin\uff5c>", "function", "<\uff5ctool\u2581sep\uff5c>"),
        end=("\n```", "<\uff5ctool\u2581call\u2581end\uff5c>"), between="\n", name_end=("\n```json\n",),
    ),
    CallFormat(
        name="deepseek_v31", models="DeepSeek-V3.1", signs=("<\uff5ctool\u2581sep\uff5c>",), style="named",
        section_begin=("<\uff5ctool\u2581calls\u2581begin\uff5c>",), section_end=("<\uff5ctool\u2581calls\u2581end\uff5c>",),
        begin=("<\uff5ctool\u2581call\u2581begin\uff5c>",), end=("<\uff5ctool\u2581call\u2581end\uff5c>",),
        name_end=("<\uff5ctool\u2581sep\uff5c>",),
    ),
    CallFormat(
        name="seed_oss", models="Seed-OSS", signs=("<seed:tool_call>",), style="parameters",
        begin=("<seed:tool_call>", "\n<function="), name_end=(">\n",), end=("</function>", "\n</seed:tool_call>"),
        between="\n", key_begin="<parameter=", key_end=(">",), value_end="</parameter>\n",
    ),
    CallFormat(
        name="qwen3_coder", models="Qwen3-Coder", signs=("<tool_call>", "<function=", "<parameter="), style="parameters",
        begin=("<tool_call>", "\n<function="), name_end=(">\n",), end=("</function>", "\n</tool_call>"),
        between="\n", key_begin="<parameter=", key_end=(">\n",), value_end="\n</parameter>\n",
    ),
    CallFormat(
        name="glm45", models="GLM-4.5 and later", signs=("<tool_call>", "<arg_key>"), style="parameters",
        begin=("<tool_call>",), name_end=("\n",), end=("</tool_call>",), between="\n",
        key_begin="<arg_key>", key_end=("</arg_key>", "\n<arg_value>"), value_end="</arg_value>\n",
    ),
    CallFormat(
        name="gemma4", models="Gemma 4", signs=("<|tool_call>",), style="literals",
        begin=("<|tool_call>", "call:"), end=("<tool_call|>",), quote='<|"|>',
    ),
    CallFormat(
        name="functiongemma", models="FunctionGemma", signs=("<start_function_call>",), style="literals",
        begin=("<start_function_call>", "call:"), end=("<end_function_call>",), quote="<escape>",
    ),
    CallFormat(
        name="granite", models="Granite 3", signs=("<|tool_call|>",), style="object",
        section_begin=("<|tool_call|>", "["), section_end=("]",), between=", ",
    ),
    CallFormat(
        name="phi4_mini_json", models="Phi-4-mini with vLLM's template", signs=("functools[",), style="object",
        section_begin=("functools", "["), section_end=("]",), between=", ",
    ),
    CallFormat(
        name="hermes", models="Qwen2.5, Qwen3, SmolLM3, Granite 4, Hermes", signs=("<tool_call>",), style="object",
        begin=("<tool_call>\n",), end=("\n</tool_call>",), between="\n",
    ),
    CallFormat(
        name="pythonic", models="Llama 4 and 3.2, Gemma 3 with vLLM's templates", signs=("func_name1(params_name1=",),
        style="literals", section_begin=("<|python_start|>", "["), section_end=("]",), between=", ", bare="[",
    ),
    CallFormat(
        name="llama3_json", models="Llama 3 and 4", signs=('"parameters":', "ipython"), style="object",
        section_begin=("<|python_tag|>",), between="; ", arguments_key="parameters", bare="{",
    ),
)}  # fmt: skip


def choose(template: str, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> ChatFormat:
    """The rows of these names; for "auto" those whose words stand in the text of the chat template."""
    return ChatFormat(
        reasoning=_row(REASONING, reasoning_parser, template), calls=_row(CALLS, tool_call_parser, template)
    )


def _row(rows: dict[str, Any], name: str, template: str) -> Any:
    """The first row that is meant: those with more signs stand before those with fewer."""
    if name != "auto":
        return None if name == "none" else rows[name]
    return next((row for row in rows.values() if all(sign in template for sign in row.signs)), None)
