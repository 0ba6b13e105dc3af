"""Items to messages of a chat, and parts of an answer to items and events: reasoning, text, calls, in any order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from openai.types.responses.response_output_item import ResponseOutputItem
from pydantic import TypeAdapter

from pagegraph.runtime.text.chat_output import CallArguments, CallBegin, Content, Part, Reasoning
from pagegraph.web.openai_responses.answer import Items
from pagegraph.web.openai_responses.items import messages_of, new_id, read_items

EVENT, ITEM = TypeAdapter(ResponseStreamEvent), TypeAdapter(ResponseOutputItem)
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"}


def result(id: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": f"of {id}"}


def tool_call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([THOUGHT, said("a")], [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]),
        (
            [THOUGHT, said("a"), call("1"), call("2"), result("1"), result("2")],
            [
                {"role": "assistant", "content": "a", "reasoning_content": "hm",
                 "tool_calls": [tool_call("1"), tool_call("2")]},
                {"role": "tool", "tool_call_id": "1", "content": "of 1"},
                {"role": "tool", "tool_call_id": "2", "content": "of 2"},
            ],
        ),
        (
            [call("1"), result("1"), call("2")],
            [
                {"role": "assistant", "content": "", "tool_calls": [tool_call("1")]},
                {"role": "tool", "tool_call_id": "1", "content": "of 1"},
                {"role": "assistant", "content": "", "tool_calls": [tool_call("2")]},
            ],
        ),
        ([said("a"), said("b")], [said("a"), said("b")]),
        ([call("1"), said("b")], [{"role": "assistant", "content": "", "tool_calls": [tool_call("1")]}, said("b")]),
        ([said("a"), THOUGHT, said("b")], [said("a"), {**said("b"), "reasoning_content": "hm"}]),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}, call("1")],
         [{"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [tool_call("1")]}]),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x"}, said("a")], [said("a")]),
        ([{**result("1"), "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
         [{"role": "tool", "tool_call_id": "1", "content": "a\nb"}]),
    ],
)  # fmt: skip
def test_items_of_one_turn_are_one_message(items: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    assert messages_of(read_items(items, lambda id: None)) == messages


def test_read_items_can_be_read_again() -> None:
    items = read_items([THOUGHT, said("a"), call("1"), result("1"), {"role": "user", "content": "b"}], lambda id: None)
    assert read_items(items, lambda id: None) == items
    assert len({item["id"] for item in items}) == len(items) and items[0]["id"] == "rs_1"
    stored = {item["id"]: item for item in items}
    assert read_items([{"type": "item_reference", "id": id} for id in stored], stored.get) == items
    assert new_id("reasoning").startswith("rs_") and new_id("resp") != new_id("resp")


PARTS: list[Part] = [
    Reasoning("I "), Reasoning("think"), Content("so "), Content("it is"), CallBegin(0, "call_1", "f"),
    CallArguments(0, '{"a"'), CallArguments(0, ": 1}"), CallBegin(1, "call_2", "g"), Content("done"),
]  # fmt: skip


def test_parts_become_items() -> None:
    items = Items()
    events = [event for part in PARTS for event in items.add(part)] + list(items.close())
    assert [item["type"] for item in items.items] == [
        "reasoning", "message", "function_call", "function_call", "message",
    ]  # fmt: skip
    reasoning, message, call, bare, last = items.items
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "I think"}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "so it is" and last["content"][0]["text"] == "done"
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "f", '{"a": 1}')
    assert bare["arguments"] == "" and all(item["status"] == "completed" for item in items.items)
    assert [event["type"].removeprefix("response.") for event in events if event["output_index"] == 2] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    assert [event["type"].removeprefix("response.") for event in events if event["output_index"] == 0] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
    ]  # fmt: skip
    assert all(read_items([item], lambda id: None) for item in items.items)  # what came may be sent back


some_parts = st.one_of(
    st.builds(Reasoning, st.text(min_size=1)),
    st.builds(Content, st.text(min_size=1)),
    st.builds(CallBegin, st.just(0), st.text("abc", min_size=1), st.text("fg", min_size=1)),
)


@given(st.lists(st.tuples(some_parts, st.lists(st.text(min_size=1), max_size=2))), st.booleans())
def test_any_stream_is_valid_and_adds_up(parts: list[tuple[Part, list[str]]], cut: bool) -> None:
    items = Items()
    events = []
    for part, arguments in parts:
        events += list(items.add(part))
        if isinstance(part, CallBegin):
            events += [event for text in arguments for event in items.add(CallArguments(0, text))]
    events += list(items.close("incomplete" if cut else "completed"))
    done: dict[int, dict[str, Any]] = {}
    deltas: dict[int, str] = {}
    for number, event in enumerate(events):
        EVENT.validate_json(json.dumps({**event, "sequence_number": number}), strict=True)
        index = event["output_index"]
        if event["type"] == "response.output_item.added":
            assert index == len(deltas) and event["item"]["status"] == "in_progress"
            deltas[index] = ""
        elif event["type"] == "response.output_item.done":
            done[index] = event["item"]
        else:
            assert event["item_id"] == items.items[index]["id"]
            deltas[index] += event.get("delta", "")
    assert list(done.values()) == items.items
    for index, item in done.items():
        ITEM.validate_json(json.dumps(item), strict=True)
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert text == deltas[index]
    statuses = [item["status"] for item in items.items]
    assert statuses == ["completed"] * (len(statuses) - 1) + ["incomplete" if cut else "completed"] * bool(statuses)
