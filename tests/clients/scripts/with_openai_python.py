"""openai-python, sync and async, over every endpoint: the client that the others are built on."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from typing import Any

from cases import API_URL, KEY, MODEL, TIMEOUT, case, main, note
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI, pydantic_function_tool
from shapes import REPEAT, Person, Weather

client = OpenAI(base_url=API_URL, api_key=KEY, timeout=TIMEOUT, max_retries=0)
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = dict(model=MODEL, temperature=0)
CHAT: dict[str, Any] = dict(**GREEDY, messages=QUESTION)
WRITE: dict[str, Any] = dict(**GREEDY, prompt="The capital of France is", max_tokens=8)
RESPOND: dict[str, Any] = dict(**GREEDY, input="What is the capital of France?", max_output_tokens=64)


TOOL = pydantic_function_tool(Weather, name="weather")
RESPONSE_TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tell the weather of a city.",
    "parameters": TOOL["function"]["parameters"],  # pyright: ignore[reportTypedDictNotRequiredAccess]
    "strict": True,
}


def open_async() -> AsyncOpenAI:
    return AsyncOpenAI(base_url=API_URL, api_key=KEY, timeout=TIMEOUT, max_retries=0)


# models


@case("plain")
def models() -> None:
    (found,) = client.models.list().data
    assert found.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    try:
        client.models.retrieve("no-such-model")
    except NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("a model that is not there was found")


# chat


@case("plain")
def chat() -> None:
    answer = client.chat.completions.create(**CHAT)
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "") and choice.finish_reason == "stop"
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@case("plain")
async def chat_async_eight_at_once() -> None:
    async with open_async() as opened:
        answers = await asyncio.gather(*(opened.chat.completions.create(**CHAT) for _ in range(8)))
    texts = {answer.choices[0].message.content for answer in answers}
    assert len(texts) == 1 and "Paris" in (texts.pop() or "")


@case("plain")
def chat_logprobs() -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and answer.usage
    assert len(logprobs.content) == answer.usage.completion_tokens
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0
    text = b"".join(bytes(token.bytes or []) for token in logprobs.content).decode()
    assert text.startswith(answer.choices[0].message.content or "nothing")


@case("plain")
def chat_n_and_seed() -> None:
    ask = {**CHAT, "temperature": 1.0, "seed": 7, "n": 2, "max_tokens": 12}
    found = [[c.message.content for c in client.chat.completions.create(**ask).choices] for _ in range(2)]
    assert found[0] == found[1] and len(set(found[0])) == 2


@case("plain")
def chat_refusals_are_named() -> None:
    for field, value in (("temperature", 3), ("max_tokens", -1), ("messages", [])):
        try:
            client.chat.completions.create(**{**CHAT, field: value})
        except BadRequestError as error:
            assert error.param == field and error.type == "invalid_request_error", error.body
        else:
            raise AssertionError(f"{field}={value} was taken")


@case("stream")
def chat_stream() -> None:
    stream = client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == client.chat.completions.create(**CHAT).choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert not chunks[-1].choices and chunks[-1].usage and not any(chunk.usage for chunk in chunks[:-1])


@case("stream")
def chat_stream_helper() -> None:
    with client.chat.completions.stream(**CHAT, logprobs=True, top_logprobs=2) as stream:
        kinds = {event.type for event in stream}
    final = stream.get_final_completion()
    assert {"content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert "Paris" in (final.choices[0].message.content or "")


@case("stream")
async def chat_stream_async() -> None:
    async with open_async() as opened:
        stream = await opened.chat.completions.create(**CHAT, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert len(pieces) > 3 and "Paris" in "".join(pieces)


@case("tools")
def chat_tool_required() -> None:
    answer = client.chat.completions.create(**CHAT, tools=[TOOL], tool_choice="required")
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.type == "function" and call.function.name == "weather" and call.id
        Weather.model_validate_json(call.function.arguments)


NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@case("tools")
def chat_tool_named_and_its_answer_used() -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    first = client.chat.completions.create(**GREEDY, messages=messages, tools=[TOOL], tool_choice=NAMED)
    message = first.choices[0].message
    assert message.tool_calls and len(message.tool_calls) == 1
    call = message.tool_calls[0]
    assert call.type == "function"
    Weather.model_validate_json(call.function.arguments)
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    second = client.chat.completions.create(
        **GREEDY, messages=messages, tools=[TOOL], tool_choice="none", max_tokens=40
    )
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls


@case("tools")
def chat_tool_parse() -> None:
    answer = client.chat.completions.parse(**CHAT, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    calls = answer.choices[0].message.tool_calls
    assert calls and len(calls) == 1 and isinstance(calls[0].function.parsed_arguments, Weather)


@case("tools")
def chat_tool_stream() -> None:
    ask: dict[str, Any] = dict(**CHAT, tools=[TOOL], tool_choice=NAMED)
    with client.chat.completions.stream(**ask) as stream:
        events = list(stream)
    final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls and final.finish_reason == "tool_calls" or final.finish_reason == "stop"
    call = final.message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Weather)
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == call.function.arguments
    whole = client.chat.completions.create(**ask).choices[0].message.tool_calls
    assert whole and whole[0].type == "function" and whole[0].function.arguments == call.function.arguments


@case("tools")
def chat_tool_auto() -> None:
    ask: dict[str, Any] = dict(
        **GREEDY, messages=[{"role": "user", "content": REPEAT}], tools=[TOOL], max_completion_tokens=100
    )
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls, choice
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
    streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed and streamed[0].function.arguments == choice.message.tool_calls[0].function.arguments
    assert Weather.model_validate_json(streamed[0].function.arguments) == Weather(city="Oslo", days=3)


@case("structured")
def chat_parse() -> None:
    answer = client.chat.completions.parse(**CHAT, response_format=Person, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Person)


@case("structured")
def chat_json_object() -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Write a JSON object with your name."}],
        temperature=0,
        max_tokens=200,
        response_format={"type": "json_object"},
    )
    choice = answer.choices[0]
    if choice.finish_reason == "length":
        assert (choice.message.content or "").lstrip().startswith("{")
    else:
        assert isinstance(json.loads(choice.message.content or ""), dict)


@case("structured")
def chat_structured_stream() -> None:
    with client.chat.completions.stream(**CHAT, response_format=Person, max_tokens=100) as stream:
        for _ in stream:
            pass
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


@case("structured")
async def chat_parse_async() -> None:
    async with open_async() as opened:
        answer = await opened.chat.completions.parse(**CHAT, response_format=Person, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Person)


@case("structured")
def chat_structured_outputs_of_the_field() -> None:
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[a-c]{3}"}, "[a-c]{3}"),
    ]
    for kind, expected in kinds:
        answer = client.chat.completions.create(**CHAT, max_tokens=20, extra_body={"structured_outputs": kind})
        assert re.fullmatch(expected, answer.choices[0].message.content or ""), answer.choices[0].message.content


# completions


@case("plain")
def completions() -> None:
    answer = client.completions.create(**WRITE)
    assert "Paris" in answer.choices[0].text and answer.choices[0].finish_reason == "length"
    several = client.completions.create(**{**WRITE, "prompt": ["One", "Two"]}, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


@case("plain")
def completions_logprobs_and_echo() -> None:
    answer = client.completions.create(**WRITE, logprobs=2, echo=True)
    found = answer.choices[0].logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and answer.usage
    assert len(found.tokens) == answer.usage.total_tokens and answer.choices[0].text.startswith(WRITE["prompt"])
    assert found.token_logprobs[0] is None and all(value <= 0 for value in found.token_logprobs[1:])


@case("plain")
async def completions_async() -> None:
    async with open_async() as opened:
        answer = await opened.completions.create(**WRITE)
    assert "Paris" in answer.choices[0].text


@case("stream")
def completions_stream() -> None:
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**WRITE, stream=True) if chunk.choices]
    assert "".join(pieces) == client.completions.create(**WRITE).choices[0].text


# responses


@case("plain")
def responses() -> None:
    answer = client.responses.create(**RESPOND)
    assert answer.status == "completed" and "Paris" in answer.output_text and answer.usage
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    follow = client.responses.create(**{**RESPOND, "input": "And of Italy?"}, previous_response_id=answer.id)
    assert follow.output_text and follow.previous_response_id == answer.id and follow.usage
    assert follow.usage.input_tokens > answer.usage.input_tokens


@case("plain")
async def responses_async() -> None:
    async with open_async() as opened:
        answer = await opened.responses.create(**RESPOND, instructions="Answer in one word.")
    assert answer.output_text


@case("stream")
def responses_stream() -> None:
    with client.responses.stream(**RESPOND) as stream:
        events = list(stream)
    final = stream.get_final_response()
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert "Paris" in text and text == final.output_text


@case("tools")
def responses_tool_and_its_answer_used() -> None:
    ask: dict[str, Any] = {**RESPOND, "tools": [RESPONSE_TOOL]}
    first = client.responses.create(**ask, tool_choice="required", parallel_tool_calls=False)
    (call,) = [item for item in first.output if item.type == "function_call"]
    Weather.model_validate_json(call.arguments)
    output: list[Any] = [{"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}]
    second = client.responses.create(**{**ask, "input": output}, previous_response_id=first.id, tool_choice="none")
    assert second.output_text


@case("tools")
def responses_tool_stream() -> None:
    ask: dict[str, Any] = {**RESPOND, "tools": [RESPONSE_TOOL], "tool_choice": {"type": "function", "name": "weather"}}
    with client.responses.stream(**ask) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (call,) = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert deltas == call.arguments
    Weather.model_validate_json(call.arguments)


@case("structured")
def responses_parse() -> None:
    answer = client.responses.parse(**{**RESPOND, "max_output_tokens": 100}, text_format=Person)
    assert isinstance(answer.output_parsed, Person)


@case("structured")
def responses_structured_stream() -> None:
    with client.responses.stream(**{**RESPOND, "max_output_tokens": 100}, text_format=Person) as stream:
        for _ in stream:
            pass
    assert isinstance(stream.get_final_response().output_parsed, Person)


# embeddings


@case("embeddings")
def embeddings() -> None:
    texts = ["a cat", "a dog", "stock prices"]
    as_base64 = client.embeddings.create(model=MODEL, input=texts)
    as_floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [item.index for item in as_floats.data] == [0, 1, 2] and as_floats.usage.prompt_tokens > 0
    for ours, theirs in zip(as_base64.data, as_floats.data):
        assert math.dist(ours.embedding, theirs.embedding) < 1e-3 * math.hypot(*theirs.embedding)


@case("embeddings")
async def embeddings_async() -> None:
    async with open_async() as opened:
        answer = await opened.embeddings.create(model=MODEL, input="a cat")
    assert len(answer.data) == 1 and any(answer.data[0].embedding)


if __name__ == "__main__":
    note("sync and async; chat, completions, Responses API, embeddings, models")
    os.environ.pop("OPENAI_API_KEY", None)
    main("openai")
