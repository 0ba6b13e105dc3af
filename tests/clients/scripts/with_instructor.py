"""instructor over openai-python, in every mode that it has for servers that speak OpenAI's API."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import instructor
from cases import API_URL, KEY, MODEL, TIMEOUT, case, main, note
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict
from shapes import QUESTION, Person, Weather

MODES = ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "RESPONSES_TOOLS")
HELD = tuple(mode for mode in MODES if mode not in ("JSON", "MD_JSON"))  # by a grammar of the type
OPTIONS: dict[str, Any] = dict(model=MODEL, temperature=0, max_retries=1)
ASK: dict[str, Any] = dict(**OPTIONS, messages=[{"role": "user", "content": QUESTION}])


def opened(mode: str) -> Any:
    plain = OpenAI(base_url=API_URL, api_key=KEY, timeout=TIMEOUT, max_retries=0)
    return instructor.from_openai(plain, mode=instructor.Mode[mode])


def create(mode: str) -> None:
    assert isinstance(opened(mode).create(response_model=Person, **ASK), Person)


for held in HELD:
    case("tools" if "TOOLS" in held else "structured", held)(functools.partial(create, held))


class Anything(BaseModel):
    """Any JSON object: in the modes JSON and MD_JSON the type is only told to the model, which holds it to nothing."""

    model_config = ConfigDict(extra="allow")


@case("structured", "JSON")
def json_mode() -> None:
    assert isinstance(opened("JSON").create(response_model=Anything, **ASK), Anything)


@case("structured", "MD_JSON")
def json_in_markdown() -> None:
    block = '```json\n{"city": "Oslo", "days": 3}\n```'
    held: Any = {"structured_outputs": {"choice": [block]}}
    found = opened("MD_JSON").create(response_model=Weather, **ASK, extra_body=held)
    assert isinstance(found, Weather) and (found.city, found.days) == ("Oslo", 3)


@case("structured", "async JSON_SCHEMA")
async def asynchronous() -> None:
    plain = AsyncOpenAI(base_url=API_URL, api_key=KEY, timeout=TIMEOUT, max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
    assert isinstance(await client.create(response_model=Person, **ASK), Person)


def partial_stream(mode: str) -> None:
    *_, last = opened(mode).create_partial(response_model=Person, **ASK)
    Person.model_validate(last.model_dump())


for held in ("TOOLS", "JSON_SCHEMA"):
    case("stream", f"partial {held}")(functools.partial(partial_stream, held))


@case("tools", "PARALLEL_TOOLS")
def parallel() -> None:
    # The mode leaves the choice to the model, and this one would choose nothing.
    ask = {**ASK, "max_tokens": 1000, "extra_body": {"tool_choice": "required"}}
    found = list(opened("PARALLEL_TOOLS").create(response_model=Iterable[Weather], **ask))
    assert found and all(isinstance(item, Weather) for item in found)


if __name__ == "__main__":
    note("modes " + ", ".join((*MODES, "PARALLEL_TOOLS")))
    main("instructor")
