"""Grammars of answers: they let a model write calls as its format has them, with good arguments, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from pagegraph.runtime.structured_output import StructuredOutputs
from pagegraph.runtime.text.call_writer import write_calls
from pagegraph.runtime.text.chat import Chat
from pagegraph.runtime.text.formats import CALLS, ChatFormat
from tests.runtime.text.test_chat import tokenizer
from tests.runtime.text.test_chat_output import joined

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer"},
        "unit": {"enum": ["c", "f"]},
        "deep": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}}}},
    },
    "required": ["city"],
}
TOOLS = {"weather": SCHEMA, "clock": {}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("weather", {"city": 'Pa"ris', "days": -2, "unit": "c", "deep": {"a": [True]}}),
    ("weather", {"city": "Köln", "unit": "f"}),
    ("clock", {}),
]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("weather", {"days": 2}), ("weather", {"city": "x", "days": "y"}), ("weather", {"city": "x", "unit": "k"}),
    ("weather", {"city": "x" * 13}), ("weather", {"city": "x", "other": 1}), ("nobody", {}), ("clock", {"a": 1}),
]  # fmt: skip
NAMES = [
    name for name in CALLS if name != "pythonic"
]  # whose strings are JSON's here, and Python's where a model writes


class Model:
    """A chat of one format and whether its grammar lets a text through. `special`: markers are tokens of their own."""

    def __init__(self, name: str, special: bool, reasoning: str = "qwen3") -> None:
        format = ChatFormat(calls=CALLS[name])
        markers = [word for word in format.words(True) if word[0] in "<[" and word[-1] in ">]" and len(word) > 2]
        texts = dict.fromkeys(("<eos>", "<think>", "</think>", *markers)) if special else ["<eos>"]
        self.tokenizer = tokenizer("{{ tools }}", tuple(texts))
        self.chat = Chat(self.tokenizer, name, "openai" if name == "openai" else reasoning)
        backend: Any = self.tokenizer._backend
        self._masks = LLTokenizer(backend.to_str(), eos_token=backend.token_to_id("<eos>"))

    def lets(self, text: str, prompt: str = "", **asked: Any) -> bool:
        asked = {"tools": TOOLS, "required": True, "parallel": True, "structured": None, **asked}
        structured = self.chat.grammar(self.tokenizer.encode(prompt), **asked)
        assert structured is not None and structured.grammar is not None
        matcher = LLMatcher(self._masks, structured.grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text)
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

    def reads(self, text: str) -> list[tuple[str, dict[str, Any]]]:
        output = self.chat.output([], tools=TOOLS)
        parts = joined(output.add(text) + output.finish())
        assert [kind for kind, _ in parts] == ["call", "arguments"] * (len(parts) // 2)
        return [(parts[at][1], json.loads(parts[at + 1][1])) for at in range(0, len(parts), 2)]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_calls_of_every_format(name: str, special: bool) -> None:
    model = Model(name, special or name == "openai")
    form = CALLS[name]

    def written(*calls: tuple[str, dict[str, Any]]) -> str:
        return write_calls(form, calls).removesuffix("<|call|>")  # which ends the answer

    for call in GOOD:
        assert model.lets(written(call)), call
        assert model.reads(written(call)) == [call]
    for call in BAD:
        assert not model.lets(written(call)), call
    assert not model.lets("Hello") and not model.lets("") and not model.lets(written(GOOD[0]) + "!")
    if name != "openai":  # which calls one tool at a time
        assert model.lets(written(*GOOD)) and model.reads(written(*GOOD)) == GOOD
        assert not model.lets(written(*GOOD), parallel=False)
        assert not model.lets(written(*[GOOD[2]] * 17))


def test_arguments_are_an_object_where_a_schema_takes_others_too() -> None:
    model = Model("hermes", special=False)
    open_to_null = {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}}
    for arguments, good in (({}, True), ({"a": 1}, True), ({"a": None}, False), (None, False)):
        call = f'<tool_call>\n{{"name": "clock", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        assert model.lets(call, tools={"clock": open_to_null}) == good, arguments


def test_python_calls_have_strings_that_are_json_too() -> None:
    model = Model("pythonic", special=False)
    assert model.lets('[weather(city="a\\"b", days=2, deep={"a": [true]}), clock()]')
    assert not model.lets('[weather(city="a", days="b")]') and not model.lets("[weather()]") and not model.lets("[x()]")


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_is_free_and_comes_first(special: bool) -> None:
    model = Model("hermes", special)
    call = write_calls(CALLS["hermes"], [GOOD[1]])
    assert (
        model.lets(call) and model.lets(f"<think>Hm {{.</think>\n\n{call}") and model.lets(f"\n<think></think>{call}")
    )
    assert (
        not model.lets(f"Hm.</think>{call}") and not model.lets("<think>Hm.</think>") and not model.lets("<think>Hm.")
    )
    assert model.lets(f"Hm.</think>{call}", prompt="<think>\n") and not model.lets(call, prompt="<think>\n")
    assert model.lets(call, prompt="<think>\n\n</think>\n") and not model.lets(
        f"<think>Hm.</think>{call}", prompt="<think>\n\n</think>\n"
    )
    assert model.lets(f"Hm.</think>{call}", continued="<think>So") and model.lets(call, continued="<think>So</think>")
    assumed = Model("hermes", special, "deepseek_r1")
    assert assumed.lets(f"Hm.</think>{call}") and not assumed.lets(call)


def test_a_structure_behind_reasoning_or_instead_of_calls() -> None:
    model = Model("hermes", special=True)
    schema = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    call = write_calls(CALLS["hermes"], [GOOD[1]])
    alone: dict[str, Any] = {"tools": None, "required": False, "structured": schema}
    assert model.lets('<think>Hm.</think>\n{"a": 1}', **alone) and model.lets('{"a": 1}', **alone)
    assert not model.lets('<think>Hm.</think>{"a": "b"}', **alone) and not model.lets(call, **alone)
    either: dict[str, Any] = {"required": False, "structured": schema}
    assert model.lets('<think>Hm.</think>{"a": 1}', **either) and model.lets(call, **either)
    assert not model.lets("Hello", **either)
    for other in (StructuredOutputs(choice=["yes", "no"]), StructuredOutputs(grammar='start: "yes"')):
        assert model.lets("<think>Hm.</think>yes", **alone | {"structured": other})
    harmony = Model("openai", special=True)
    final = '<|channel|>final<|message|>{"a": 1}'
    assert harmony.lets(final, **alone) and not harmony.lets('{"a": 1}', **alone)
    assert harmony.lets(f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{final}", **alone)


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek_v3", "qwen3_coder", "glm45", "gemma4", "granite"])
def test_strict_tools_where_any_text_may_come(name: str) -> None:
    model = Model(name, special=True)
    free: dict[str, Any] = {"required": False, "strict": list(TOOLS)}
    for call in GOOD:
        written = write_calls(CALLS[name], [call])
        assert model.lets(written, **free) and model.lets(f"<think>Hm.</think>Well: {written}", **free)
    for call in BAD:
        assert not model.lets(write_calls(CALLS[name], [call]), **free)
    assert model.lets("Hello.", **free) and model.lets("", **free) and model.lets("<think>Hm.</think>Hello.", **free)
    if CALLS[name].style in ("object", "named"):
        written = write_calls(CALLS[name], [("weather", {"city": "x", "other": 1}), ("clock", {})])
        for strict, lets in ((["clock"], True), (["weather"], False)):
            assert model.lets(written, required=False, strict=strict) == lets


def test_strict_tools_whose_calls_look_like_text_are_not_held() -> None:
    for name, special in (("hermes", False), ("llama3_json", True), ("pythonic", True), ("phi4_mini_json", True)):
        asked: dict[str, Any] = {"tools": TOOLS, "required": False, "parallel": True, "structured": None}
        assert Model(name, special).chat.grammar([], **asked, strict=list(TOOLS)) is None


def test_without_reasoning_and_tools_a_structure_is_what_it_was() -> None:
    chat = Chat(tokenizer("{{ messages }}"))
    structured = StructuredOutputs(json_object=True)
    asked: dict[str, Any] = {"tools": None, "required": False, "parallel": True}
    assert chat.grammar([], **asked, structured=structured) is structured
    assert chat.grammar([], **asked | {"tools": TOOLS}, structured=None) is None
