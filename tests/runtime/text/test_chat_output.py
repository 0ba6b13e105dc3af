"""Answers to parts: the same however the text is cut, and nothing of it lost."""

from __future__ import annotations

import time
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


PARIS = [("call", "weather"), ("arguments", '{"city": "Paris", "days": 2}')]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
CLOCK = [("call", "clock"), ("arguments", "{}")]
TOOLS = {"weather": WEATHER, "clock": {"type": "object", "properties": {}}}
JSON = '{"city": "Paris", "days": 2}'
# By row: two calls as its models write them, and what is nearly one.
TWO_CALLS = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "mistral": f"[TOOL_CALLS]weather[ARGS]{JSON}[TOOL_CALLS]clock[CALL_ID]a1B2c3D4e[ARGS]{{}}",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{{}}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    "seed_oss": "<seed:tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n"
    "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=clock>\n</function>\n</seed:tool_call>",
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>clock\n</tool_call>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:2}<tool_call|><|tool_call>call:clock{}<tool_call|>',
    "functiongemma": "<start_function_call>call:weather{city:<escape>Paris<escape>,days:2}<end_function_call>"
    "<start_function_call>call:clock{}<end_function_call>",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}, {{"name": "clock", "arguments": {{}}}}]',
    "phi4_mini_json": f'functools[{{"name": "weather", "arguments": {JSON}}}, {{"name": "clock", "arguments": {{}}}}]',
    "pythonic": '[weather(city="Paris", days=2), clock()]',
    "llama3_json": f'{{"name": "weather", "parameters": {JSON}}}; {{"name": "clock", "parameters": {{}}}}',
    "openai": "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    f"{JSON}<|call|><|start|>assistant to=functions.clock<|channel|>commentary json<|message|>{{}}<|call|>",
}
OTHERS = [
    ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}}}, {{"name": "clock", "arguments": {{}}}}]',
     PARIS + CLOCK),
    ("mistral", f"Well.[TOOL_CALLS]weather{JSON}", [("content", "Well."), *PARIS]),
    ("mistral", "[TOOL_CALLS]?", [("content", "[TOOL_CALLS]?")]),
    ("llama3_json", f'<|python_tag|>{{"name": "weather", "parameters": {JSON}}}', PARIS),
    ("llama3_json", f'{{"type": "function", "name": "weather", "parameters": {JSON}}}', PARIS),
    ("llama3_json", '{"name": "Ann", "parameters": {}}', [("content", '{"name": "Ann", "parameters": {}}')]),
    ("llama3_json", '{"city": "Paris"}', [("content", '{"city": "Paris"}')]),
    ("llama3_json", "Hello {}", [("content", "Hello {}")]),
    ("pythonic", r"[weather(city='a\x41\u00e9\q\/\ud83d\ude00\U0001F999\U99999999\x4g\x4142\u00')]",
     [("call", "weather"),
      ("arguments", r'{"city": "aAé\\q/\ud83d\ude00🦙\\U99999999\\x4gA42\\u00"}')]),
    ("pythonic", r"[weather(city='a\u00", [("call", "weather"), ("arguments", '{"city": "a"')]),
    ("pythonic", "[1, 2]", [("content", "[1, 2]")]),
    ("pythonic", "[other(a=1)]", [("content", "[other(a=1)]")]),
    ("pythonic", "<|python_start|>[weather(city='a\\'\\n\\u00e9', x=[True, None, {'k': (1,)}],)]<|python_end|>",
     [("call", "weather"), ("arguments", '{"city": "a\'\\n\u00e9", "x": [true, null, {"k": [1]}]}'),
      ("content", "<|python_end|>")]),
    ("gemma4", '<|tool_call>call:weather{city:<|"|>a"b<|"|>,at:{x:1.5,<|"|>y<|"|>:[true,no]}}<tool_call|>!',
     [("call", "weather"), ("arguments", '{"city": "a\\"b", "at": {"x": 1.5, "y": [true, "no"]}}'), ("content", "!")]),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\na\n\"b\n</parameter>\n<parameter=days>\ntwo\n"
     "</parameter>\n<parameter=other>\n1\n</parameter>\n</function>\n</tool_call>",
     [("call", "weather"), ("arguments", '{"city": "a\\n\\"b", "days": "two", "other": "1"}')]),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nPar",
     [("call", "weather"), ("arguments", '{"city": "Par"}')]),
    ("qwen3_coder", "<tool_call>\n<fun>", [("content", "<tool_call>\n<fun>")]),
    ("glm45", "<tool_call>weather now", [("content", "<tool_call>weather now")]),
    ("openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
     [("content", "Hm.Hi")]),
    ("openai", "<|channel|>commentary<|message|>Look:<|end|><|start|>assistant<|channel|>commentary to=functions.clock"
     "<|message|><|call|>", [("content", "Look:"), *CLOCK]),
    ("openai", "Hi", [("content", "Hi")]),
]  # fmt: skip


def check(format: ChatFormat, text: str, expected: list[tuple[str, ...]], **options: Any) -> None:
    assert read(format, text, **options) == expected
    assert read(format, text, range(1, len(text)), **options) == expected
    for cut in range(1, len(text)):
        assert read(format, text, [cut], **options) == expected


@pytest.mark.parametrize("name", CALLS)
def test_two_calls_of_every_format(name: str) -> None:
    format = ChatFormat(calls=CALLS[name])
    check(format, TWO_CALLS[name], PARIS + CLOCK, tools=TOOLS)
    check(format, TWO_CALLS[name] + "\n", PARIS + CLOCK, tools=TOOLS)
    check(format, TWO_CALLS[name], PARIS, tools=TOOLS, single=True)
    assert read(format, TWO_CALLS[name], tools=None)[0][0] == "content"


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_have_to_come_leave_no_beginning_of_one_as_content(name: str) -> None:
    format, text = ChatFormat(reasoning=REASONING["qwen3"], calls=CALLS[name]), TWO_CALLS[name]
    for end in range(len(text)):
        found = read(format, text[:end], tools=TOOLS, held=True)
        assert found == read(format, text[:end], range(end), tools=TOOLS, held=True)
        assert [one for kind, one in found if kind == "call"] == ["weather", "clock"][: (len(found) + 1) // 2]
        assert all(kind != "content" for kind, _ in found)
    if name != "openai":  # which thinks in messages of its own
        assert read(format, "<think>hm</think>\n" + text[:3], tools=TOOLS, held=True) == [("reasoning", "hm")]


@pytest.mark.parametrize(("name", "text", "expected"), OTHERS)
def test_variants_and_what_is_no_call(name: str, text: str, expected: list[tuple[str, ...]]) -> None:
    check(ChatFormat(calls=CALLS[name]), text, expected, tools=TOOLS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_megabyte_of_anything_takes_a_second_at_most(name: str) -> None:
    format = ChatFormat(reasoning=REASONING["openai" if name == "openai" else "qwen3"], calls=CALLS[name])
    two = TWO_CALLS[name]
    repeated = [*format.words(True), two, two[: len(two) // 2], '{"name":"weather","arguments":{"a":', *"[{\"\\< (x\n'"]
    for before in ("", two[: len(two) // 3]):
        for text in repeated:
            output = ChatOutput(format, tools=TOOLS)
            begun = time.process_time()
            parts = output.add(before + text * (1_000_000 // len(text))) + output.finish()
            assert time.process_time() - begun < 2.0, (text, before)  # 0.1 to 0.9 on an idle core
            del parts


@pytest.mark.parametrize("name", CALLS)
def test_pieces_of_adversarial_text_lose_nothing(name: str) -> None:
    format = ChatFormat(calls=CALLS[name])
    for word in format.words(True):
        text = word * 300
        parts = read(format, text, range(5, len(text), 5), tools=TOOLS)
        assert parts == read(format, text, tools=TOOLS)
        if name != "openai" and all(kind == "content" for kind, _ in parts):
            assert parts == [("content", text)]
