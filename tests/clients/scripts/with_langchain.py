"""LangChain's ChatOpenAI, OpenAI and OpenAIEmbeddings against the server's base URL."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from cases import API_URL, KEY, MODEL, TIMEOUT, case, main, note
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import SecretStr
from shapes import ANSWER, CITIES, QUESTION, Person, Weather

COMMON: dict[str, Any] = dict(
    base_url=API_URL, api_key=SecretStr(KEY), model=MODEL, temperature=0, timeout=TIMEOUT, max_retries=0
)
chat = ChatOpenAI(**COMMON, max_completion_tokens=100)
responses = ChatOpenAI(**COMMON, max_completion_tokens=100, use_responses_api=True)


@tool(args_schema=Weather)
def weather(city: str, days: int) -> str:
    """Tell the weather of a city."""
    return f"In {days} days it rains in {city}."


@case("plain")
def invoke() -> None:
    answer = chat.invoke(QUESTION)
    assert ANSWER in answer.text and answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0


@case("plain")
def batch() -> None:
    assert len({answer.text for answer in chat.batch([QUESTION] * 4)}) == 1


@case("plain")
def logprobs() -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert all(len(token["top_logprobs"]) == 2 for token in answer.response_metadata["logprobs"]["content"])


@case("plain")
def completion_model() -> None:
    assert ANSWER in OpenAI(**COMMON, max_tokens=8).invoke("The capital of France is")


@case("plain", "Responses API")
def responses_invoke() -> None:
    assert ANSWER in responses.invoke(QUESTION).text


@case("stream")
def stream() -> None:
    pieces = list(chat.stream(QUESTION, stream_usage=True))
    text = "".join(piece.text for piece in pieces)
    assert len(pieces) > 3 and text == chat.invoke(QUESTION).text
    assert any(piece.usage_metadata for piece in pieces)


@case("stream")
async def stream_async() -> None:
    assert ANSWER in "".join([piece.text async for piece in chat.astream(QUESTION)])


@case("stream", "Responses API stream")
def responses_stream() -> None:
    assert ANSWER in "".join(piece.text for piece in responses.stream(QUESTION))


def check_tools(model: ChatOpenAI) -> None:
    """A tool is called, run, and its answer sent back."""
    question = HumanMessage("What is the weather in Oslo?")
    first = model.bind_tools([weather], tool_choice="required", parallel_tool_calls=False).invoke([question])
    (call, *_) = first.tool_calls
    assert not first.invalid_tool_calls and call["args"]["city"] in CITIES
    results = [weather.invoke(call) for call in first.tool_calls]
    assert all(isinstance(result, ToolMessage) and "rains" in result.text for result in results)
    second = model.bind_tools([weather], tool_choice="none").invoke([question, first, *results])
    assert second.text and not second.tool_calls


@case("tools")
def tool_required_and_its_answer_used() -> None:
    check_tools(chat)


@case("tools")
def tool_named() -> None:
    answer = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).invoke(QUESTION)
    assert len(answer.tool_calls) == 1 and answer.tool_calls[0]["name"] == "weather"


@case("tools")
def tool_stream() -> None:
    whole: Any = None
    for piece in chat.bind_tools([weather], tool_choice="weather").stream(QUESTION):
        whole = piece if whole is None else whole + piece
    assert whole.tool_calls[0]["args"]["city"] in CITIES and not whole.invalid_tool_calls


@case("tools", "Responses API tool")
def responses_tool() -> None:
    check_tools(responses)


def check_structured(method: Any, model: ChatOpenAI = chat) -> None:
    answer = model.with_structured_output(Person, method=method, strict=True if method != "json_mode" else None)
    assert isinstance(answer.invoke(QUESTION), Person)


@case("structured")
def structured_json_schema() -> None:
    check_structured("json_schema")


@case("structured")
def structured_function_calling() -> None:
    check_structured("function_calling")


@case("structured")
def structured_json_mode_is_json() -> None:
    model = chat.with_structured_output(None, method="json_mode", include_raw=True)
    found: Any = model.invoke('Answer in JSON with one key "city" and a city: {"city": "Paris"}')
    raw = found["raw"]
    assert isinstance(found["parsed"], dict) or raw.response_metadata["finish_reason"] == "length"


@case("structured")
def structured_stream() -> None:
    *_, last = chat.with_structured_output(Person, method="json_schema").stream(QUESTION)
    assert isinstance(last, Person)


@case("structured", "Responses API structured")
def responses_structured() -> None:
    check_structured("json_schema", responses)


# Without check_embedding_ctx_length it sends token ids of a tokenizer that the model does not have.
embeddings = OpenAIEmbeddings(
    base_url=API_URL, api_key=SecretStr(KEY), model=MODEL, check_embedding_ctx_length=False, timeout=TIMEOUT
)


@case("embeddings", "embeddings")
def check_embeddings() -> None:
    found = embeddings.embed_documents(["a cat", "a dog"])
    query = embeddings.embed_query("a cat")
    assert len(found) == 2 and math.dist(found[0], query) < 0.05 * math.hypot(*query)


@case("embeddings")
async def embeddings_async() -> None:
    one, two = await asyncio.gather(embeddings.aembed_query("a cat"), embeddings.aembed_query("a dog"))
    assert one != two


if __name__ == "__main__":
    note("chat and Responses API")
    main("langchain-openai")
