"""Tools and reasoning over HTTP: what the engine is asked, and what a client of OpenAI's reads of the answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from flask.testing import FlaskClient
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from pagegraph.runtime.text.tokenizer import Tokenizer
from tests.conftest import FakeEngine

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{{ reasoning_effort }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>{% endif %}{% endif %}{# </think> #}"
)
MESSAGES = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\nhm\n</think>\n\nLook.\n{CALL}\n{CALL}"


@pytest.fixture
def model(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A model whose template takes tools and says what it is given."""
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def say(fake_engine: FakeEngine, tokenizer_folder: Path) -> Callable[[str], None]:
    """A function that has the engine answer with a text, a token a delta."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    fake_engine.info = msgspec.structs.replace(fake_engine.info, max_model_len=4096)
    end = tokenizer.encode("<|end|>")

    def answer(text: str, ended: bool = True) -> None:
        ids = tokenizer.encode(text) + (end if ended else [])
        stop_id, reason = (end[0], "stop") if ended else (-1, "length")
        fake_engine.script = lambda submit: list(FakeEngine.deltas(submit, ids, finish=reason, stop_id=stop_id))

    answer(ANSWER)
    return answer


@pytest.fixture
def client(make_app: Callable[..., Any], model: Path, say: Callable[[str], None]) -> OpenAI:
    transport = httpx.WSGITransport(app=make_app(model=str(model)))
    return OpenAI(api_key="x", base_url="http://test/v1", max_retries=0, http_client=httpx.Client(transport=transport))


def prompt_of(fake_engine: FakeEngine, folder: Path) -> str:
    return Tokenizer.load(folder).decode(fake_engine.submits[-1].token_ids, skip_special=False)


ASK: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER]}


def test_a_loop_of_calls_and_results(
    client: OpenAI, say: Callable[..., None], fake_engine: FakeEngine, model: Path
) -> None:
    answer = client.chat.completions.create(**ASK)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Look.")
    assert choice.message.reasoning == choice.message.reasoning_content == "hm"  # type: ignore[attr-defined]
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", '{"city": "Paris"}')] * 2
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)
    details = answer.usage.completion_tokens_details  # type: ignore[union-attr]
    assert details.reasoning_tokens == len(Tokenizer.load(model).encode("<think>\nhm\n</think>"))  # type: ignore[union-attr]
    assert json.dumps(WEATHER) in prompt_of(fake_engine, model)
    say("It rains.")
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"{index}: rain"} for index, call in enumerate(calls)
    ]
    second = client.chat.completions.create(**{**ASK, "messages": [*MESSAGES, choice.message, *results]})
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It rains.", "stop")
    assert second.choices[0].message.tool_calls is None
    sent = prompt_of(fake_engine, model)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>' in sent
    assert "<|tool|>0: rain<|end|><|tool|>1: rain<|end|><|assistant|>" in sent


class City(BaseModel):
    city: str


def test_helpers_of_the_client_read_streams_and_models(client: OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": City.model_json_schema()}}
    parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, tools=[tool])  # type: ignore[arg-type]
    call = (parsed.choices[0].message.tool_calls or [])[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    deltas: dict[int, str] = {}
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=[WEATHER], n=2) as stream:  # type: ignore[arg-type]
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                deltas[event.index] = deltas.get(event.index, "") + event.arguments_delta
        final = stream.get_final_completion()
    assert deltas == {0: '{"city": "Paris"}' * 2, 1: '{"city": "Paris"}' * 2}  # of two choices
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Look."
        assert [one.function.arguments for one in choice.message.tool_calls or []] == ['{"city": "Paris"}'] * 2


def test_log_probabilities_come_once_for_each_token(client: OpenAI, model: Path) -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True, logprobs=True))
    entries = [entry for chunk in chunks for entry in (chunk.choices[0].logprobs or _NONE).content or ()]
    whole = client.chat.completions.create(**ASK, logprobs=True).choices[0].logprobs
    assert whole is not None and [one.token for one in entries] == [one.token for one in whole.content or ()]
    assert len(entries) == len(Tokenizer.load(model).encode(ANSWER)) + 1


class _NONE:
    content = None


@pytest.mark.parametrize(
    ("fields", "calls", "reason"),
    [
        ({"parallel_tool_calls": False}, 1, "tool_calls"),
        ({"tool_choice": "none"}, 0, "stop"),
        ({"stop": ["Paris"]}, 1, "tool_calls"),
        ({"max_tokens": 40}, 0, "length"),
    ],
)
def test_how_many_calls_come(client: OpenAI, fields: dict[str, Any], calls: int, reason: str) -> None:
    choice = client.chat.completions.create(**ASK, **fields).choices[0]
    assert (len(choice.message.tool_calls or []), choice.finish_reason) == (calls, reason)


def test_none_leaves_the_tools_out_of_the_prompt(client: OpenAI, fake_engine: FakeEngine, model: Path) -> None:
    client.chat.completions.create(**ASK, tool_choice="none")
    assert "weather" not in prompt_of(fake_engine, model)


def test_functions_are_answered_with_a_function_call(client: OpenAI) -> None:
    choice = client.chat.completions.create(model="tiny", messages=MESSAGES, functions=[WEATHER["function"]]).choices[0]  # type: ignore[call-overload]
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    assert choice.message.function_call.arguments == '{"city": "Paris"}'


def test_calls_that_have_to_come_are_asked_as_a_grammar(client: OpenAI, fake_engine: FakeEngine) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, several in (("required", True), (named, False)):
        client.chat.completions.create(**ASK, tool_choice=choice)
        structured = fake_engine.submits[-1].params.structured_outputs
        assert structured is not None and structured.grammar is not None
        assert '{\\"name\\": \\"weather\\"' in structured.grammar and ("{0,15}" in structured.grammar) == several
    client.chat.completions.create(**ASK)
    assert fake_engine.submits[-1].params.structured_outputs is None


def test_reasoning_is_left_out_where_nobody_wants_it(client: OpenAI) -> None:
    answer = client.chat.completions.create(**ASK, extra_body={"include_reasoning": False})
    message = answer.choices[0].message
    assert not hasattr(message, "reasoning") and message.content == "Look."
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0  # type: ignore[union-attr]


def test_reasoning_opened_by_the_prompt(client: OpenAI, say: Callable[..., None]) -> None:
    say("hm</think>Yes")
    body = {"chat_template_kwargs": {"thinking": True}}
    message = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=body).choices[0].message  # type: ignore[arg-type]
    assert (message.content, message.reasoning) == ("Yes", "hm")  # type: ignore[attr-defined]


def test_effort_reaches_a_template_that_reads_it(
    client: OpenAI, fake_engine: FakeEngine, model: Path, http: FlaskClient
) -> None:
    client.chat.completions.create(**ASK, reasoning_effort="low")
    assert "low<|user|>" in prompt_of(fake_engine, model)
    plain = http.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "reasoning_effort": "low", "verbosity": "high"}
    )
    assert plain.status_code == 200 and plain.headers["x-ignored-fields"] == "reasoning_effort, verbosity"
    refused = http.post("/v1/chat/completions", json={"messages": MESSAGES, "documents": [{"text": "a"}]})
    assert (refused.status_code, refused.json["error"]["param"]) == (400, "documents")


def test_a_template_and_its_own_variables_are_not_the_request_s(client: OpenAI) -> None:
    for body in (
        {"chat_template": "{{ 7 * 7 }}"}, {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"tools": []}}, {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"tokenize": True}}, {"chat_template_kwargs": {"bos_token": "x"}},
        {"chat_template_kwargs": {"self": 1}},
    ):  # fmt: skip
        with pytest.raises(BadRequestError) as refused:
            client.chat.completions.create(**ASK, extra_body=body)
        assert refused.value.param == next(iter(body))


def test_a_model_without_tools_in_its_template_is_told_of_them(
    http: FlaskClient, say: Callable[..., None], fake_engine: FakeEngine, tokenizer_folder: Path
) -> None:
    body = json.dumps(ASK)  # the test client would sort the keys
    answer = http.post("/v1/chat/completions", data=body, content_type="application/json")
    assert answer.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert "reasoning" not in answer.json["choices"][0]["message"]  # its template says nothing of it
    sent = prompt_of(fake_engine, tokenizer_folder)
    assert sent.startswith("<|system|>You may call functions.") and json.dumps(WEATHER["function"]) in sent


def test_two_requests_of_one_id_get_answers_of_their_own(client: OpenAI, say: Callable[..., None]) -> None:
    same: dict[str, Any] = {"extra_headers": {"X-Request-Id": "same"}, "extra_body": {"request_id": "same"}}
    one = client.chat.completions.create(**ASK, **same)
    say("Other.")
    other = client.chat.completions.create(**ASK, **same)
    assert one.id == other.id and one.choices[0].message.tool_calls
    assert (other.choices[0].message.content, other.choices[0].message.tool_calls) == ("Other.", None)


def test_tools_of_which_no_grammar_can_be_made_are_refused(client: OpenAI, fake_engine: FakeEngine) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, max_model_len=10**6)
    listed = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 20_000}}}
    tools = [{"type": "function", "function": {"name": f"tool_{number}", "parameters": listed}} for number in range(8)]
    for extra, param in ((tools, "tools"), (tools[:1] * 2, "tools[1]")):
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES, tools=extra, tool_choice="required")  # type: ignore[arg-type]
        assert caught.value.param == param
