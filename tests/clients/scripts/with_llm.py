"""llm with models of extra-openai-models.yaml, the way its users name a server of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from cases import API_URL, MODEL, case, main, note
from shapes import ANSWER, QUESTION, REPEAT, Person

folder = Path(tempfile.mkdtemp(prefix="llm-"))
os.environ["LLM_USER_PATH"] = str(folder)
served: dict[str, Any] = dict(model_name=MODEL, api_base=API_URL, supports_tools=True, supports_schema=True)
(folder / "extra-openai-models.yaml").write_text(
    yaml.safe_dump(
        [
            dict(model_id="chat", **served),
            dict(model_id="responses", responses=True, **served),
            dict(model_id="completion", completion=True, model_name=MODEL, api_base=API_URL),
        ]
    )
)

import llm  # noqa: E402  (it reads the folder)

GREEDY: dict[str, Any] = dict(temperature=0, max_tokens=100)


def weather(city: str, days: int) -> str:
    """Tell the weather of a city."""
    return f"In {days} days it rains in {city}."


def ask(model: str, question: str = QUESTION, **more: Any) -> Any:
    return llm.get_model(model).prompt(question, **{**GREEDY, **more})


@case("plain")
def chat() -> None:
    answer = ask("chat", stream=False)
    assert ANSWER in answer.text() and answer.usage().output > 0


@case("plain")
def conversation() -> None:
    talk = llm.get_model("chat").conversation()
    assert ANSWER in talk.prompt(QUESTION, **GREEDY).text() and talk.prompt("And of Italy?", **GREEDY).text()


@case("plain")
def completion() -> None:
    assert ANSWER in ask("completion", "The capital of France is", max_tokens=8).text()


@case("plain")
def responses() -> None:
    assert ANSWER in ask("responses", stream=False).text()


@case("stream")
def chat_stream() -> None:
    pieces = list(ask("chat"))
    assert len(pieces) > 3 and "".join(pieces) == ask("chat", stream=False).text()


@case("stream")
async def chat_stream_async() -> None:
    answer = llm.get_async_model("chat").prompt(QUESTION, **GREEDY)
    assert ANSWER in "".join([piece async for piece in answer])


@case("stream")
def responses_stream() -> None:
    assert ANSWER in "".join(ask("responses"))


def check_chain(model: str, stream: bool) -> None:
    """llm leaves the choice to the model, so the model is told what to write. A call is run and its answer sent back."""
    called = []

    def after_call(tool: Any, call: Any, result: Any) -> None:
        called.append((call.name, call.arguments, result.output))
        if len(called) == 2:
            raise llm.CancelToolCall("often enough")

    talk = llm.get_model(model).conversation()
    chain = talk.chain(REPEAT, tools=[weather], stream=stream, options=GREEDY, after_call=after_call, chain_limit=3)
    *_, last = chain.responses()
    last.text()
    assert called and called[0] == ("weather", {"city": "Oslo", "days": 3}, "In 3 days it rains in Oslo."), called


@case("tools")
def tools_offered() -> None:
    check_chain("chat", stream=False)


@case("tools")
def tools_offered_stream() -> None:
    check_chain("chat", stream=True)


@case("tools", "tools offered, Responses API")
def tools_responses() -> None:
    check_chain("responses", stream=True)


@case("structured")
def schema() -> None:
    Person.model_validate_json(ask("chat", schema=Person, stream=False).text())


@case("structured")
def schema_stream() -> None:
    Person.model_validate_json(ask("chat", schema=Person).text())


@case("structured", "schema, Responses API")
def schema_responses() -> None:
    Person.model_validate_json(ask("responses", schema=Person).text())


if __name__ == "__main__":
    note("chat, completion and Responses API")
    main("llm")
