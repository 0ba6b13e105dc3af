"""anthropic-python over /v1/messages."""

from __future__ import annotations

from typing import Any, Literal

from anthropic import Anthropic, AsyncAnthropic, BadRequestError, beta_tool
from cases import BASE_URL, KEY, MODEL, TIMEOUT, case, main, note
from pydantic import BaseModel
from shapes import ANSWER, QUESTION, Weather

OPTIONS: dict[str, Any] = dict(base_url=BASE_URL, api_key=KEY, timeout=TIMEOUT, max_retries=0)
client = Anthropic(**OPTIONS)
ASK: dict[str, Any] = dict(
    model=MODEL,
    max_tokens=100,
    messages=[{"role": "user", "content": QUESTION}],
    extra_body={"temperature": 0},  # no argument of its own any more
)
TOOL: dict[str, Any] = dict(
    name="weather", description="Tell the weather of a city.", input_schema=Weather.model_json_schema()
)


class Animal(BaseModel):
    """An animal. anthropic-python tells bounds of numbers and strings in words, which hold nothing: so there are none."""

    kind: Literal["cat", "dog"]
    tame: bool


def text_of(answer: Any) -> str:
    return "".join(block.text for block in answer.content if block.type == "text")


@case("plain")
def messages() -> None:
    answer = client.messages.create(**ASK, system="Answer in one sentence.")
    assert ANSWER in text_of(answer) and answer.stop_reason == "end_turn" and answer.role == "assistant"
    assert answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0


@case("plain", "async")
async def asynchronous() -> None:
    async with AsyncAnthropic(**OPTIONS) as opened:
        assert ANSWER in text_of(await opened.messages.create(**ASK))


@case("plain")
def stopping() -> None:
    short = client.messages.create(**{**ASK, "max_tokens": 2})
    assert short.stop_reason == "max_tokens"
    stopped = client.messages.create(**ASK, stop_sequences=["Paris"])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "Paris"


@case("plain")
def count_tokens() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=ASK["messages"])
    usage = client.messages.create(**ASK).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@case("plain")
def refusals_have_their_shape() -> None:
    try:
        client.messages.create(**{**ASK, "max_tokens": 0})
    except BadRequestError as error:
        assert "max_tokens" in str(error), error
        body: Any = error.body
        assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error", body
    else:
        raise AssertionError("max_tokens=0 was taken")


@case("stream")
def stream() -> None:
    with client.messages.stream(**ASK) as opened:
        pieces = list(opened.text_stream)
        final = opened.get_final_message()
    assert len(pieces) > 3 and "".join(pieces) == text_of(final) == text_of(client.messages.create(**ASK))
    assert final.stop_reason == "end_turn" and final.usage.output_tokens > 0


@case("stream")
def stream_of_events() -> None:
    kinds = [event.type for event in client.messages.create(**ASK, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@case("stream")
async def stream_async() -> None:
    async with AsyncAnthropic(**OPTIONS) as opened, opened.messages.stream(**ASK) as found:
        assert ANSWER in "".join([piece async for piece in found.text_stream])


@case("tools")
def tool_any_and_its_answer_used() -> None:
    first = client.messages.create(**ASK, tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    calls = [block for block in first.content if block.type == "tool_use"]
    assert first.stop_reason == "tool_use" and calls
    results = []
    for call in calls:
        Weather.model_validate(call.input)
        results.append(dict(type="tool_result", tool_use_id=call.id, content="It rains."))
    talk = [*ASK["messages"], dict(role="assistant", content=first.content), dict(role="user", content=results)]
    second = client.messages.create(**{**ASK, "messages": talk}, tools=[TOOL], tool_choice={"type": "none"})
    assert text_of(second)


@case("tools")
def tool_named_stream() -> None:
    with client.messages.stream(**ASK, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"}) as opened:
        deltas = [event.partial_json for event in opened if event.type == "input_json"]
        final = opened.get_final_message()
    (call,) = [block for block in final.content if block.type == "tool_use"]
    assert Weather.model_validate(call.input) == Weather.model_validate_json("".join(deltas))


@case("tools")
def tool_runner() -> None:
    called = []

    @beta_tool
    def weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
        """Tell the weather of a city."""
        called.append(city)
        return f"It rains in {city}."

    # One turn: the runner repeats the choice, and a choice of `any` never ends.
    runner = client.beta.messages.tool_runner(
        **{**ASK, "max_tokens": 300},
        tools=[weather],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2,
    )
    assert len(list(runner)) == 2 and called


@case("structured")
def parse() -> None:
    answer = client.messages.parse(**ASK, output_format=Animal)
    assert isinstance(answer.parsed_output, Animal)


@case("structured")
def structured_stream() -> None:
    with client.messages.stream(**ASK, output_format=Animal) as opened:
        final: Any = opened.get_final_message()
    assert isinstance(final.parsed_output, Animal)


if __name__ == "__main__":
    note("/v1/messages, count_tokens, the tool runner")
    main("anthropic")
