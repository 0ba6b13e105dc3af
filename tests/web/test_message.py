"""What a client joins from a stream is the message that is not streamed, whatever comes in whichever pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagegraph.runtime.ipc.protocol import TokenDelta
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.text.call_writer import write_calls
from pagegraph.runtime.text.chat import Chat
from pagegraph.runtime.text.formats import CALLS, ChatFormat
from pagegraph.runtime.text.output import TextOutput
from pagegraph.web.message import Message
from tests.runtime.text.test_chat import tokenizer

TOOLS = {"weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}, "clock": {}}
_SPECIAL = ("<|end|>", "<think>", "</think>", *ChatFormat(calls=CALLS["openai"]).words(True), "[TOOL_CALLS]", "[ARGS]")
SPECIAL = tuple(dict.fromkeys((*_SPECIAL, "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<|tool_call>", '<|"|>')))
TOKENIZER = tokenizer("{{ tools }}", SPECIAL)
CHATS = {name: Chat(TOKENIZER, name, "openai" if name == "openai" else "qwen3") for name in CALLS}
SCRIPTS = ("Hello, world. ", "Grüße — ça va? ", "你好，世界 ", "🦙🦙 ", "שלום ", " \n\n", "{[<\"'\\", "<|end|>")
WORDS = [word for row in CALLS.values() for word in ChatFormat(calls=row).words(True)]
ARGUMENTS = st.fixed_dictionaries({}, optional={"city": st.sampled_from(SCRIPTS[:-1]), "days": st.integers(-5, 99)})
CALL = st.one_of(ARGUMENTS.map(lambda arguments: ("weather", arguments)), st.just(("clock", {})))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str]:
    """A format's name, and a text with reasoning, content, calls and pieces of all of them."""
    name = draw(st.sampled_from(list(CALLS)))
    said = st.sampled_from(SCRIPTS)
    calls = st.lists(CALL, min_size=1, max_size=3).map(lambda listed: write_calls(CALLS[name], listed))
    broken = calls.flatmap(lambda text: st.integers(0, len(text)).map(lambda at: text[:at]))
    thought = said.map(lambda text: f"<think>{text}</think>")
    any_part = st.one_of(said, calls, calls, broken, thought, st.sampled_from(WORDS))
    return name, draw(st.sampled_from(["", "<think>", "<|channel|>analysis<|message|>"])) + "".join(
        draw(st.lists(any_part, max_size=5))
    )


def pieces(ids: Sequence[int], cuts: random.Random, output: TextOutput) -> list[Any]:
    """The ids in deltas of one to a dozen, as text."""
    found, at = [], 0
    while True:
        count = cuts.choice((1, 1, 2, 5, 12))
        last = at + count >= len(ids)
        found.append(output.add(TokenDelta("", list(ids[at : at + count]), "stop" if last else "")))
        if found[-1].finish_reason:
            return found
        at += count


def client(message: Message, given: list[Any]) -> dict[str, Any]:
    """The message as a client joins it from deltas, with the reason why it ended and the tokens of reasoning."""
    joined: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for piece in given:
        for part in message.parts(piece):
            delta = message.delta(part)
            joined["content"] += delta.get("content", "")
            joined["reasoning"] += delta.get("reasoning", "")
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(joined["tool_calls"]) and call["function"]["arguments"] == ""
                    joined["tool_calls"].append(dict(call["function"]))
                else:
                    assert call["index"] == len(joined["tool_calls"]) - 1 and call["function"].keys() == {"arguments"}
                    joined["tool_calls"][-1]["arguments"] += call["function"]["arguments"]
    return joined | {"end": message.finish_reason(given[-1].finish_reason), "tokens": message.reasoning_tokens}


def whole(message: Message, given: list[Any]) -> dict[str, Any]:
    for piece in given:
        message.add(piece)
    said = message.whole()
    return {
        "content": said["content"] or "",
        "reasoning": said.get("reasoning", ""),
        "tool_calls": [call["function"] for call in said.get("tool_calls", ())],
        "end": message.finish_reason(given[-1].finish_reason),
        "tokens": message.reasoning_tokens,
    }


def check(name: str, text: str, stop: list[str], seed: int, parallel: bool) -> None:
    chat, ids = CHATS[name], TOKENIZER.encode(text)
    results = []
    for run, join in enumerate((client, whole, client)):
        message = Message(chat.output([], tools=TOOLS, single=not parallel))
        output = TextOutput(TOKENIZER, [], SamplingParams(), stop, kept_ids=chat.kept_ids(tools=True))
        results.append(join(message, pieces(ids, random.Random(seed + run), output)))
    assert results[0] == results[1] == results[2]
    said = results[0]
    assert (said["end"] == "tool_calls") == bool(said["tool_calls"])
    assert len(said["tool_calls"]) <= 1 or parallel
    for word in SPECIAL:
        assert word not in said["content"]


CASES = st.tuples(
    answers(),
    st.lists(st.sampled_from(["world", "你", "}", "\n\n", "<"]), max_size=2),
    st.integers(0, 9),
    st.booleans(),
)


@given(CASES)
@settings(max_examples=300)
def test_a_stream_joined_is_the_answer_that_is_not_streamed(case: Any) -> None:
    (name, text), stop, seed, parallel = case
    check(name, text, stop, seed, parallel)


@pytest.mark.slow
@given(CASES)
@settings(max_examples=2500)
def test_a_stream_joined_is_the_answer_that_is_not_streamed_at_length(case: Any) -> None:
    (name, text), stop, seed, parallel = case
    check(name, text, stop, seed, parallel)


@given(st.sampled_from(list(CALLS)), st.lists(CALL, min_size=1, max_size=3), st.integers(0, 9))
@settings(max_examples=150)
def test_calls_come_back_as_they_were_written(name: str, calls: list[Any], seed: int) -> None:
    message = Message(CHATS[name].output([], tools=TOOLS))
    output = TextOutput(TOKENIZER, [], SamplingParams(), kept_ids=CHATS[name].kept_ids(tools=True))
    said = whole(message, pieces(TOKENIZER.encode(write_calls(CALLS[name], calls)), random.Random(seed), output))
    assert said["content"] == ""
    assert [(call["name"], json.loads(call["arguments"])) for call in said["tool_calls"]] == calls


def test_a_function_call_is_a_message_s_only_one() -> None:
    message = Message(CHATS["hermes"].output([], tools=TOOLS, single=True), legacy=True)
    text = write_calls(CALLS["hermes"], [("weather", {"city": "Paris"}), ("clock", {})])
    given_pieces = pieces(TOKENIZER.encode(text), random.Random(0), TextOutput(TOKENIZER, [], SamplingParams()))
    deltas = [message.delta(part)["function_call"] for piece in given_pieces for part in message.parts(piece)]
    assert deltas[0] == {"name": "weather", "arguments": ""} and message.finish_reason("stop") == "function_call"
    assert json.loads("".join(delta["arguments"] for delta in deltas)) == {"city": "Paris"}
    assert message.finish_reason("length") == "length"


def test_reasoning_that_nobody_wants_is_left_out_and_counted() -> None:
    message = Message(CHATS["hermes"].output([]), shows_reasoning=False)
    output = TextOutput(TOKENIZER, [], SamplingParams(), kept_ids=CHATS["hermes"].kept_ids(tools=False))
    said = whole(message, pieces(TOKENIZER.encode("<think>Hm.</think>Yes"), random.Random(0), output))
    assert (said["content"], said["reasoning"], said["tokens"]) == ("Yes", "", 5)
