"""Answers to parts: the same however the text is cut, and nothing of it lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from pagegraph.runtime.text.chat_output import CallArguments, CallBegin, ChatOutput, Content, Part, Reasoning
from pagegraph.runtime.text.formats import CALLS, REASONING, ChatFormat

THINK_HERMES = ChatFormat(reasoning=REASONING["qwen3"], calls=CALLS["hermes"])


def read(format: ChatFormat, text: str, cuts: Iterable[int] = (), **options: Any) -> list[tuple[str, ...]]:
    """The parts of `text` cut at these places, adjacent ones of a kind joined: their kind and text."""
    output, parts, at = ChatOutput(format, **{"tools": {}, **options}), [], 0
    for cut in [*cuts, len(text)]:
        parts += output.add(text[at:cut])
        at = cut
    return joined(parts + output.finish())


def joined(parts: list[Part]) -> list[tuple[str, ...]]:
    result: list[tuple[str, ...]] = []
    kinds: Mapping[type, str] = {Reasoning: "reasoning", Content: "content", CallArguments: "arguments"}
    calls = 0
    for part in parts:
        if isinstance(part, CallBegin):
            assert part.index == calls
            calls += 1
            result.append(("call", part.name))
            continue
        assert not isinstance(part, CallArguments) or part.index == calls - 1
        kind = kinds[type(part)]
        if result and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + part.text)
        else:
            result.append((kind, part.text))
    return result


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}\\""]}}\n</tool_call>'
GOLDEN = [
    ("Hello \n", [("content", "Hello \n")]),
    ("<think>\nhm\n</think>\n\nYes", [("reasoning", "hm"), ("content", "Yes")]),
    ("<think>hm", [("reasoning", "hm")]),
    ("a <think>hm</think>", [("content", "a <think>hm</think>")]),
    (CALL, [("call", "f"), ("arguments", '{"a": [1, "}\\""]}')]),
    (f"Look.\n{CALL}\n{CALL}\n", [
        ("content", "Look."), ("call", "f"), ("arguments", '{"a": [1, "}\\""]}'),
        ("call", "f"), ("arguments", '{"a": [1, "}\\""]}')]),
    ('<tool_call>{"arguments": {"q": 1}, "name": "g"}</tool_call>', [("call", "g"), ("arguments", '{"q": 1}')]),
    ('<tool_call>{"name": "g", "arguments": "{\\"q\\":1}"}</tool_call>', [("call", "g"), ("arguments", '{"q":1}')]),
    ('<tool_call>{"name": "g"}\n{"name": "h"}</tool_call>', [
        ("call", "g"), ("arguments", "{}"), ("call", "h"), ("arguments", "{}")]),
    ('<tool_call>{"name": "g", "arguments": {"a": 1</tool_call> b', [
        ("call", "g"), ("arguments", '{"a": 1'), ("content", "b")]),
    ('<tool_call>{"name": "g", "arguments": {"a', [("call", "g"), ("arguments", '{"a')]),
    ("<tool_call>no call</tool_call>", [("content", "<tool_call>no call</tool_call>")]),
    ('<tool_call>{"name": 5, "arguments": {}}', [("content", '<tool_call>{"name": 5, "arguments": {}}')]),
    ('x<tool_call>{"name": "f"', [("content", 'x<tool_call>{"name": "f"')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), GOLDEN)
def test_think_and_hermes_however_they_are_cut(text: str, expected: list[tuple[str, ...]]) -> None:
    assert read(THINK_HERMES, text) == expected
    assert read(THINK_HERMES, text, range(1, len(text))) == expected
    for cut in range(len(text)):
        assert read(THINK_HERMES, text, [cut]) == expected
        assert read(THINK_HERMES, text, [cut, cut + 1]) == expected


def test_tokens_of_reasoning_are_those_that_end_in_it() -> None:
    text = "<think>hm</think>Yes"
    for cuts in ([], [3], [8, 12], range(len(text))):
        output, at = ChatOutput(THINK_HERMES), 0
        for cut in [*cuts, len(text)]:
            output.add(text[at:cut], range(at + 1, cut + 1))  # a token a character
            at = cut
        output.finish()
        assert output.reasoning_tokens == len("<think>hm</think>")


def test_without_a_format_text_is_content() -> None:
    output = ChatOutput(ChatFormat())
    assert [output.add("<think>a"), output.add(""), output.finish()] == [[Content("<think>a")], [], []]
