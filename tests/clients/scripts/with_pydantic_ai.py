"""pydantic-ai's Agent over the chat API and the Responses API, with tools and every kind of structured output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cases import API_URL, KEY, MODEL, case, main, note
from pydantic import Field
from pydantic_ai import Agent, Embedder, NativeOutput, RunContext, ToolOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from shapes import ANSWER, QUESTION, Person, Weather

provider = OpenAIProvider(base_url=API_URL, api_key=KEY)
SETTINGS: Any = dict(temperature=0, max_tokens=150, parallel_tool_calls=False)


def chat_agent(**more: Any) -> Agent[None, Any]:
    return Agent(OpenAIChatModel(MODEL, provider=provider), model_settings=SETTINGS, **more)


def responses_agent(**more: Any) -> Agent[None, Any]:
    return Agent(OpenAIResponsesModel(MODEL, provider=provider), model_settings=SETTINGS, **more)


@case("plain")
async def chat() -> None:
    found = await chat_agent().run(QUESTION)
    again = await chat_agent().run("And of Italy?", message_history=found.all_messages())
    assert ANSWER in found.output and found.usage.output_tokens > 0 and again.output


@case("plain")
async def responses() -> None:
    assert ANSWER in (await responses_agent(instructions="Answer in one sentence.").run(QUESTION)).output


async def streamed(agent: Agent[None, Any]) -> None:
    async with agent.run_stream(QUESTION) as found:
        pieces = [piece async for piece in found.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 3 and ANSWER in "".join(pieces)


@case("stream")
async def chat_stream() -> None:
    await streamed(chat_agent())


@case("stream")
async def responses_stream() -> None:
    await streamed(responses_agent())


def first_the_tool(context: RunContext[None]) -> Any:
    """The first step has to call the tool; the second has to answer."""
    return {**SETTINGS, "tool_choice": ["weather"] if context.run_step == 1 else "none"}


async def with_tool(model: Model) -> None:
    """The tool runs with arguments that its type took, and its answer goes back."""
    called = []
    agent = Agent(model, model_settings=first_the_tool)

    @agent.tool_plain
    def weather(city: Literal["Paris", "Rome", "Oslo"], days: Annotated[int, Field(ge=1, le=9)]) -> str:
        """Tell the weather of a city."""
        called.append(Weather(city=city, days=days))
        return f"It rains in {city}."

    found = await agent.run("What is the weather in Oslo?")
    assert called and found.output and found.usage.requests == 2


@case("tools")
async def chat_tool() -> None:
    await with_tool(OpenAIChatModel(MODEL, provider=provider))


@case("tools")
async def responses_tool() -> None:
    await with_tool(OpenAIResponsesModel(MODEL, provider=provider))


@case("structured")
async def chat_tool_output() -> None:
    assert isinstance((await chat_agent(output_type=Person).run(QUESTION)).output, Person)


@case("structured")
async def chat_one_of_two_tool_outputs() -> None:
    agent = chat_agent(output_type=[ToolOutput(Person, name="person"), ToolOutput(Weather, name="weather")])
    assert isinstance((await agent.run(QUESTION)).output, Person | Weather)


@case("structured")
async def chat_native_output() -> None:
    assert isinstance((await chat_agent(output_type=NativeOutput(Person)).run(QUESTION)).output, Person)


@case("structured")
async def chat_stream_of_output() -> None:
    async with chat_agent(output_type=NativeOutput(Person)).run_stream(QUESTION) as found:
        assert isinstance(await found.get_output(), Person)


@case("structured")
async def responses_tool_output() -> None:
    assert isinstance((await responses_agent(output_type=Person).run(QUESTION)).output, Person)


@case("structured")
async def responses_native_output() -> None:
    assert isinstance((await responses_agent(output_type=NativeOutput(Person)).run(QUESTION)).output, Person)


@case("embeddings")
async def embeddings() -> None:
    found = await Embedder(OpenAIEmbeddingModel(MODEL, provider=provider)).embed_documents(["a cat", "a dog"])
    assert len(found.embeddings) == 2 and found.embeddings[0] != found.embeddings[1]


if __name__ == "__main__":
    note("chat and Responses API; tool and native output")
    main("pydantic-ai-slim")
