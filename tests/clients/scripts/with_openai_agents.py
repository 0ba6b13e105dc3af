"""openai-agents as its users start: the Responses API, agents with tools and handoffs; the chat API too."""

from __future__ import annotations

import os
from typing import Any, Literal

from cases import API_URL, KEY, MODEL, case, main, note

os.environ["OPENAI_BASE_URL"] = API_URL
os.environ["OPENAI_API_KEY"] = KEY
os.environ["OPENAI_DEFAULT_MODEL"] = MODEL

from agents import (  # noqa: E402  (they read the environment)
    Agent,
    AsyncOpenAI,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    SQLiteSession,
    function_tool,
    handoff,
    set_tracing_disabled,
)
from shapes import ANSWER, QUESTION, Person  # noqa: E402

set_tracing_disabled(True)
called: list[str] = []


@function_tool
def weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """Tell the weather of a city."""
    called.append(city)
    return f"It rains in {city}."


def settings(**more: Any) -> ModelSettings:
    return ModelSettings(temperature=0, max_tokens=100, **more)


def agent(**more: Any) -> Agent[None]:
    return Agent(**{"name": "helper", "instructions": "Answer in one sentence.", "model_settings": settings(), **more})


def chat_model() -> OpenAIChatCompletionsModel:
    return OpenAIChatCompletionsModel(model=MODEL, openai_client=AsyncOpenAI())


@case("plain")
async def run() -> None:
    found = await Runner.run(agent(), QUESTION)
    assert ANSWER in found.final_output and found.context_wrapper.usage.total_tokens > 0


@case("plain")
async def session() -> None:
    memory = SQLiteSession("a conversation")
    await Runner.run(agent(), QUESTION, session=memory)
    assert (await Runner.run(agent(), "And of Italy?", session=memory)).final_output
    assert len(await memory.get_items()) == 4


@case("plain")
async def chat_completions() -> None:
    found = await Runner.run(agent(model=chat_model()), QUESTION)
    assert ANSWER in found.final_output


@case("stream")
async def streamed() -> None:
    found = Runner.run_streamed(agent(), QUESTION)
    kinds = [event.data.type async for event in found.stream_events() if event.type == "raw_response_event"]
    assert kinds.count("response.output_text.delta") > 3 and ANSWER in found.final_output


@case("stream")
async def chat_completions_streamed() -> None:
    found = Runner.run_streamed(agent(model=chat_model()), QUESTION)
    kinds = [event.data.type async for event in found.stream_events() if event.type == "raw_response_event"]
    assert kinds.count("response.output_text.delta") > 3 and ANSWER in found.final_output


async def check_tool(**more: Any) -> None:
    """The tool runs, its answer goes back, and the agent comes to an end: after a call the choice is the model's."""
    called.clear()
    asked = agent(tools=[weather], model_settings=settings(tool_choice="required", parallel_tool_calls=False), **more)
    found = await Runner.run(asked, "What is the weather in Oslo?", max_turns=4)
    assert called and isinstance(found.final_output, str)
    kinds = [item.type for item in found.new_items]
    assert kinds[0] == "tool_call_item" and "tool_call_output_item" in kinds and kinds[-1] == "message_output_item"


@case("tools")
async def tool() -> None:
    await check_tool()


@case("tools")
async def tool_chat_completions() -> None:
    await check_tool(model=chat_model())


@case("tools")
async def tool_streamed() -> None:
    called.clear()
    asked = agent(tools=[weather], model_settings=settings(tool_choice="weather", parallel_tool_calls=False))
    found = Runner.run_streamed(asked, "What is the weather in Oslo?", max_turns=4)
    names = [event.name async for event in found.stream_events() if event.type == "run_item_stream_event"]
    assert called and {"tool_called", "tool_output", "message_output_created"} <= set(names)


async def check_handoff(**more: Any) -> None:
    """One agent hands over to another, which answers."""
    other = agent(name="geographer", handoff_description="Knows capitals.", **more)
    first = agent(
        name="triage",
        handoffs=[handoff(other)],
        model_settings=settings(tool_choice="required", parallel_tool_calls=False),
        **more,
    )
    found = await Runner.run(first, QUESTION, max_turns=4)
    assert found.last_agent.name == "geographer" and found.final_output


@case("tools")
async def handed_over() -> None:
    await check_handoff()


@case("tools")
async def handed_over_chat_completions() -> None:
    await check_handoff(model=chat_model())


@case("structured")
async def output_type() -> None:
    found = await Runner.run(agent(output_type=Person), QUESTION)
    assert isinstance(found.final_output, Person)


@case("structured")
async def output_type_chat_completions() -> None:
    found = await Runner.run(agent(output_type=Person, model=chat_model()), QUESTION)
    assert isinstance(found.final_output, Person)


if __name__ == "__main__":
    note("Responses API as by default, with tools and handoffs; the chat API too")
    main("openai-agents")
