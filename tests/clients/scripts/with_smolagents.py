"""smolagents' OpenAIModel and ToolCallingAgent, which asks for a tool in every step."""

from __future__ import annotations

import json
from typing import Any

from cases import API_URL, KEY, MODEL, TIMEOUT, case, main, note
from shapes import ANSWER, QUESTION, Person
from smolagents import ActionStep, ChatMessage, MessageRole, OpenAIModel, ToolCallingAgent, tool
from smolagents.utils import AgentMaxStepsError

called: list[str] = []
ASK = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": QUESTION}])]


@tool
def weather(city: str) -> str:
    """Tell the weather of a city.

    Args:
        city: the name of the city
    """
    called.append(city)
    return f"It rains in {city}."


@tool
def final_answer(answer: str) -> str:
    """Give the final answer, which ends the task.

    Args:
        answer: what the weather is
    """
    return answer


# Bounded, so that a small model's strings end.
weather.inputs["city"]["enum"] = ["Paris", "Rome", "Oslo"]
final_answer.inputs["answer"]["enum"] = ["rain", "sun"]


def model(**more: Any) -> OpenAIModel:
    options: dict[str, Any] = dict(timeout=TIMEOUT, max_retries=0)
    return OpenAIModel(
        model_id=MODEL, api_base=API_URL, api_key=KEY, client_kwargs=options, temperature=0, max_tokens=200, **more
    )


@case("plain")
def generate() -> None:
    answer = model().generate(ASK)
    assert ANSWER in str(answer.content) and answer.token_usage and answer.token_usage.output_tokens > 0


@case("stream")
def generate_stream() -> None:
    pieces = [piece.content or "" for piece in model().generate_stream(ASK)]
    assert len(pieces) > 3 and ANSWER in "".join(pieces)


@case("tools")
def tool_calls() -> None:
    answer = model().generate(ASK, tools_to_call_from=[weather], parallel_tool_calls=False)
    assert answer.tool_calls and answer.tool_calls[0].function.name == "weather"
    assert model().parse_tool_calls(answer).tool_calls


def check_agent(stream: bool) -> None:
    """Every step is a call that was parsed and run; the agent ends with its answer or at its last step."""
    called.clear()
    tools = [weather, final_answer]
    agent = ToolCallingAgent(tools=tools, model=model(parallel_tool_calls=False), max_steps=3, stream_outputs=stream)
    found = agent.run("What is the weather in Oslo?")
    steps = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    errors = [step.error for step in steps if step.error and not isinstance(step.error, AgentMaxStepsError)]
    assert not errors and all(step.tool_calls for step in steps if not step.error), errors
    assert called or found in ("rain", "sun"), found


@case("tools")
def agent() -> None:
    check_agent(stream=False)


@case("tools")
def agent_stream() -> None:
    check_agent(stream=True)


@case("structured")
def response_format() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
    answer = model().generate(ASK, response_format=form)
    Person.model_validate(json.loads(str(answer.content)))


if __name__ == "__main__":
    note("ToolCallingAgent, a forced call in every step")
    main("smolagents")
