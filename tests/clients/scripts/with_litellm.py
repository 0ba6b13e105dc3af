"""litellm with the providers that people point at such a server: hosted_vllm/ and openai/."""

from __future__ import annotations

import json
import math
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a table of prices

import litellm
from cases import API_URL, KEY, MODEL, TIMEOUT, case, main, note
from shapes import ANSWER, QUESTION, Person, Weather

COMMON: dict[str, Any] = dict(api_base=API_URL, api_key=KEY, timeout=TIMEOUT, num_retries=0)
CHAT: dict[str, Any] = dict(
    **COMMON, model=f"hosted_vllm/{MODEL}", messages=[{"role": "user", "content": QUESTION}], temperature=0
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell the weather.", "parameters": Weather.model_json_schema()},
}
NAMED = {"type": "function", "function": {"name": "weather"}}


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


@case("plain")
def hosted_vllm() -> None:
    answer: Any = litellm.completion(**CHAT)
    assert ANSWER in text_of(answer) and answer.usage.total_tokens > 0


@case("plain")
def openai_provider() -> None:
    assert ANSWER in text_of(litellm.completion(**{**CHAT, "model": f"openai/{MODEL}"}))


@case("plain", "async")
async def asynchronous() -> None:
    assert ANSWER in text_of(await litellm.acompletion(**CHAT))


@case("plain")
def text_completion() -> None:
    answer: Any = litellm.text_completion(
        **COMMON, model=f"hosted_vllm/{MODEL}", prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert ANSWER in answer.choices[0].text


@case("plain")
def responses() -> None:
    answer: Any = litellm.responses(
        **COMMON, model=f"openai/{MODEL}", input=QUESTION, temperature=0, max_output_tokens=64
    )
    assert ANSWER in answer.output[-1].content[0].text


@case("plain")
def a_context_that_is_too_long_is_told_apart() -> None:
    try:
        litellm.completion(**{**CHAT, "messages": [{"role": "user", "content": "hello " * 20000}]})
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt of 20,000 words was taken")


@case("stream")
def stream() -> None:
    pieces: Any = list(litellm.completion(**CHAT, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == text_of(litellm.completion(**CHAT)) and pieces[-1].usage.completion_tokens > 0
    assert text_of(litellm.stream_chunk_builder(pieces)) == text


@case("stream")
async def stream_async() -> None:
    answer: Any = await litellm.acompletion(**CHAT, stream=True)
    assert ANSWER in "".join([piece.choices[0].delta.content or "" async for piece in answer])


@case("tools")
def tool_required_and_its_answer_used() -> None:
    first: Any = litellm.completion(**CHAT, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    message = first.choices[0].message
    assert message.tool_calls and first.choices[0].finish_reason == "tool_calls"
    results = []
    for call in message.tool_calls:
        Weather.model_validate_json(call.function.arguments)
        results.append(dict(role="tool", tool_call_id=call.id, name="weather", content="It rains."))
    ask = {**CHAT, "messages": [*CHAT["messages"], message.model_dump(), *results]}
    assert text_of(litellm.completion(**ask, tools=[TOOL], tool_choice="none", max_tokens=40))


@case("tools")
def tool_stream() -> None:
    pieces: Any = list(litellm.completion(**CHAT, tools=[TOOL], tool_choice=NAMED, stream=True))
    built: Any = litellm.stream_chunk_builder(pieces)
    (call,) = built.choices[0].message.tool_calls
    Weather.model_validate_json(call.function.arguments)


@case("structured")
def structured_model() -> None:
    Person.model_validate_json(text_of(litellm.completion(**CHAT, response_format=Person, max_tokens=100)))


@case("structured")
def structured_json_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
    Person.model_validate_json(text_of(litellm.completion(**CHAT, response_format=form, max_tokens=100)))


@case("structured")
def structured_json_object() -> None:
    answer: Any = litellm.completion(**CHAT, response_format={"type": "json_object"}, max_tokens=100)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text_of(answer)), dict)
    else:
        assert text_of(answer).startswith("{")


@case("embeddings")
def embeddings() -> None:
    for provider in ("hosted_vllm", "openai"):
        found: Any = litellm.embedding(**COMMON, model=f"{provider}/{MODEL}", input=["a cat", "a dog"])
        one, two = (item["embedding"] for item in found.data)
        assert math.hypot(*one) > 0 and one != two


if __name__ == "__main__":
    note("as hosted_vllm/ and as openai/")
    main("litellm")
