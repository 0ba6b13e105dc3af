"""Tools of a request: what is taken, what is refused and where, and what a template is given of a conversation with calls."""

from __future__ import annotations

from typing import Any

import pytest

from pagegraph.web.errors import ApiError
from pagegraph.web.messages import OLDER_ID
from pagegraph.web.schema import GenerationRequest, parse_chat

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "clock"}}


def chat(**fields: Any) -> GenerationRequest:
    return parse_chat({"messages": MESSAGES, **fields}, 100)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_a_tool_or_call_without_a_type_is_a_function_and_answers_need_no_call() -> None:
    """As vLLM has it: clients leave the type out, and cut old turns off."""
    function = {"name": "f", "parameters": {}}
    call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    request = parse_chat(
        {
            "messages": [
                {"role": "tool", "tool_call_id": "gone", "content": "3"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "another", "content": "4"},
                {"role": "user", "content": "and?"},
            ],
            "tools": [{"function": function}],
        },
        100,
    )
    assert request.tools.listed == [{"type": "function", "function": function}]
    assert request.messages[1]["tool_calls"][0]["type"] == "function"
    assert [message.get("tool_call_id") for message in request.messages] == ["gone", None, "another", None]


@pytest.mark.parametrize(
    ("fields", "choice", "names"),
    [
        ({}, "none", None),
        ({"tools": []}, "none", None),
        ({"tools": [], "tool_choice": "auto"}, "none", None),
        ({"tools": [WEATHER, CLOCK]}, "auto", {"weather", "clock"}),
        ({"tools": [WEATHER], "tool_choice": "auto"}, "auto", {"weather"}),
        ({"tools": [WEATHER], "tool_choice": "none"}, "none", None),
        ({"tools": [WEATHER, CLOCK], "tool_choice": allowed("auto", "clock")}, "auto", {"clock"}),
        ({"functions": [WEATHER["function"]]}, "auto", {"weather"}),
        ({"functions": [WEATHER["function"]], "function_call": "none"}, "none", None),
        ({"tools": [WEATHER], "tool_choice": "required"}, "required", {"weather"}),
        ({"tools": [WEATHER, CLOCK], "tool_choice": NAMED}, "required", {"clock"}),
        ({"tools": [WEATHER, CLOCK], "tool_choice": allowed("required", "clock")}, "required", {"clock"}),
        ({"functions": [WEATHER["function"]], "function_call": {"name": "weather"}}, "required", {"weather"}),
    ],
)
def test_which_tools_may_be_called(fields: dict[str, Any], choice: str, names: set[str] | None) -> None:
    tools = chat(**fields).tools
    assert tools.choice == choice and (tools.schemas and set(tools.schemas)) == names
    assert tools.legacy == ("functions" in fields) and tools.parallel != tools.legacy


def test_schemas_and_parallel_calls() -> None:
    assert chat(tools=[WEATHER, CLOCK]).tools.schemas == {"weather": SCHEMA, "clock": {}}
    assert not chat(tools=[WEATHER], parallel_tool_calls=False).tools.parallel


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": ["x"]}, "tools[0].type"),
        ({"tools": [CLOCK, {"type": "web_search"}]}, "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a", "description": 5}}]}, "tools[0].function.description"),
        ({"tools": [{"function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "a", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": [CLOCK, WEATHER, CLOCK]}, "tools[2]"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": 5}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto", "clock")}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": allowed("never", "weather")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "functions": [CLOCK["function"]]}, "functions"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [CLOCK["function"]], "function_call": "required!"}, "function_call"),
        ({"functions": [CLOCK["function"]], "function_call": {"name": "weather"}}, "function_call"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"verbosity": 3}, "verbosity"),
        ({"documents": "x"}, "documents"),
        (
            {
                "tools": [
                    {"function": {"name": "a", "strict": True, "parameters": {"properties": {"b": {"type": "what"}}}}}
                ]
            },
            "tools[0].function.parameters",
        ),
        (
            {
                "tools": [CLOCK, {"function": {"name": "a", "parameters": {"properties": {"b": {"type": "what"}}}}}],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
        ),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"type": "integer"}}}], "tool_choice": "required"},
            "tools[0].function.parameters",
        ),
        (
            {"functions": [{"name": "a", "parameters": {"type": ["null"]}}], "function_call": {"name": "a"}},
            "functions[0].parameters",
        ),
        (
            {"tools": [{"function": {"name": "a", "strict": True, "parameters": {"type": None}}}]},
            "tools[0].function.parameters",
        ),
        ({"documents": ["x"]}, "documents[0]"),
    ],
)
def test_bad_tools_are_refused_by_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_calls_and_results_of_a_conversation() -> None:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    history = [
        {"role": "assistant", "content": None, "tool_calls": [call | {"index": 0}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Rain."}]},
        {"role": "assistant", "function_call": function},
        {"role": "function", "name": "weather", "content": "Sun."},
        {"role": "critic", "content": "Go on."},
    ]
    assert chat(messages=[*MESSAGES, *history]).messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        {"role": "assistant", "content": "", "tool_calls": [call | {"id": OLDER_ID}]},
        {"role": "tool", "tool_call_id": OLDER_ID, "name": "weather", "content": "Sun."},
        {"role": "critic", "content": "Go on."},
    ]
