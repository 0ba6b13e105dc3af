"""What clients ask for: a tool's arguments and a record. Every value is bounded, so a small model's answer ends."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is the capital of France?"
ANSWER = "Paris"
# A small model left to choose calls nothing; this it repeats, in the format of calls that the server tells it.
REPEAT = 'Repeat this: <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
CITIES = ("Paris", "Rome", "Oslo")


class Weather(BaseModel):
    """Tell the weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome", "Oslo"]
    days: int = Field(ge=1, le=9, description="how many days ahead")


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    kind: Literal["child", "adult"]
