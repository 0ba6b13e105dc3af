"""Tools on a real small model, which a grammar holds to calls: every answer parses and its arguments are of the schema."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field

from pagegraph.compiler.step.state import NgramRange
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.text.answer_grammar import MAX_CALLS
from pagegraph.runtime.text.chat import Chat
from tests.runtime.text.test_chat_output import joined

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Short = Annotated[str, Field(max_length=24)]


class Weather(BaseModel):
    """The weather of a place."""

    model_config = ConfigDict(extra="forbid", strict=True)
    city: Short
    days: Annotated[int, Field(ge=1, le=14)] = 1
    unit: Literal["celsius", "fahrenheit"]


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: Short
    altitude: float | None


class Trip(BaseModel):
    """Plan a trip over several places."""

    model_config = ConfigDict(extra="forbid", strict=True)
    places: Annotated[list[Place], Field(min_length=1, max_length=2)]
    by_train: bool


class Clock(BaseModel):
    """The time."""

    model_config = ConfigDict(extra="forbid", strict=True)


MODELS = {"weather": Weather, "trip": Trip, "clock": Clock}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": one.__doc__ or name, "parameters": one.model_json_schema()},
    }
    for name, one in MODELS.items()
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
SEVERAL = 25  # of so many requests one may be answered with several calls; a model so small stops at the last allowed
ASKED = [
    "How warm is it in Oslo?",
    "Take me from Rome to Bern.",
    "What time is it?",
    "Hello!",
    "Schreib mir ein Gedicht.",
]


def requests(llm: LLM, count: int) -> tuple[Chat, list[list[int]], list[SamplingParams]]:
    """A chat, and prompts with parameters that hold their answers to one or several calls."""
    chat = Chat(llm.tokenizer)
    prompts, params = [], []
    for number in range(count):
        messages = [{"role": "user", "content": ASKED[number % len(ASKED)]}]
        prompt = llm.tokenizer.encode(chat.render(messages, tools=TOOLS, add_generation_prompt=True), False)
        several = number % SEVERAL == 0
        tools = {"clock": SCHEMAS["clock"]} if several else SCHEMAS
        held = chat.grammar(prompt, tools=tools, required=True, parallel=several, structured=None)
        greedy = number % 4 == 0
        params.append(
            SamplingParams(max_tokens=480, temperature=0.0 if greedy else 1.0, seed=number, structured_outputs=held)
        )
        prompts.append(prompt)
    return chat, prompts, params


def calls_of(chat: Chat, text: str) -> list[tuple[str, dict[str, Any]]]:
    output = chat.output([], tools=SCHEMAS)
    parts = joined(output.add(text) + output.finish())
    assert [kind for kind, _ in parts] == ["call", "arguments"] * (len(parts) // 2), text
    return [(parts[at][1], json.loads(parts[at + 1][1])) for at in range(0, len(parts), 2)]


def test_two_hundred_of_two_hundred_answers_are_calls_with_good_arguments(llm: LLM) -> None:
    chat, prompts, params = requests(llm, 200)
    for number, done in enumerate(llm.generate(prompts, params)):
        assert done.finish_reason == "stop", done.text
        calls = calls_of(chat, done.text)
        assert len(calls) == 1 or (number % SEVERAL == 0 and len(calls) <= MAX_CALLS)
        for name, arguments in calls:
            MODELS[name].model_validate_json(json.dumps(arguments))


@pytest.fixture(scope="module")
def held(config_of, real_model) -> tuple[list[list[int]], list[SamplingParams], list[list[int]]]:
    """Prompts, parameters and the tokens without anything that could change them."""
    llm = LLM(config_of(), built=real_model)
    _, prompts, params = requests(llm, 6)
    params = [msgspec.structs.replace(one, max_tokens=48) for one in params]
    return prompts, params, [done.token_ids for done in llm.generate(prompts, params)]


@pytest.mark.parametrize(
    "overrides",
    [
        {"speculative_method": "ngram", "num_speculative_tokens": 4},
        {"speculative_method": "suffix", "num_speculative_tokens": 4},
        {"speculative_method": "ngram"},  # as many as pay
        {"speculative_method": "suffix"},
        {"max_num_batched_tokens": 64},
        {"tight": True},  # blocks for one prompt and little more: some are preempted
    ],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_the_tokens_are_the_same_however_they_are_computed(
    config_of, real_model, held, overrides: dict[str, Any]
) -> None:
    prompts, params, expected = held
    tight = "tight" in overrides
    overrides = {name: value for name, value in overrides.items() if name != "tight"}
    if "speculative_method" in overrides:
        real_model.step.state.allow_drafts(15, NgramRange(2, 5))
    try:
        few = dataclasses.replace(real_model, num_blocks=50, max_model_len=720)
        llm = LLM(config_of(**overrides), built=few if tight else real_model)
        assert [done.token_ids for done in llm.generate(prompts, params)] == expected
    finally:
        real_model.step.state.allow_drafts(0, None)
    counters = llm.engine.scheduler.counters
    assert not tight or counters.preemptions
    assert "num_speculative_tokens" not in overrides or counters.accepted
