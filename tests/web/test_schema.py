"""Every field: what is taken, what is refused, and that a refusal names the field."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.web.errors import ApiError
from pagegraph.web.fields import UNSERVED
from pagegraph.web.json_body import parse_body
from pagegraph.web.messages import MESSAGE_FIELDS
from pagegraph.web.schema import parse_chat, parse_completion

VOCAB = 100
MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**fields: Any):
    return parse_completion({"prompt": "hi", **fields}, VOCAB)


def chat(**fields: Any):
    return parse_chat({"messages": MESSAGES, **fields}, VOCAB)


BAD = [
    ("temperature", [-0.1, 2.1, "1", True, 10**400, float("inf")]),
    ("top_p", [-0.1, 1.01, "x"]),
    ("top_k", [-2, 1.5, 2**31]),
    ("min_p", [-0.1, 1.1]),
    ("repetition_penalty", [0, 1e-6, -1, 3]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("presence_penalty", [-2.1, 2.1]),
    ("n", [0, 129, 10**9, "1", 1.5]),
    ("best_of", [0, 129, 10**6, 1.5, "2"]),
    ("prompt_logprobs", [-1, 21, 10**6, 1.5, "2", True]),
    ("seed", [2**63, -(2**63) - 1, "a"]),
    ("stream", ["yes", 1]),
    ("stream_options", [{"include_usage": True}, 3]),
    ("echo", ["yes"]),
    ("max_completion_tokens", [5]),
    ("top_logprobs", [2]),
    ("stop", [[""], [1], ["a"] * 17, {"a": 1}, "x" * 1025]),
    ("stop_token_ids", [[-1], [VOCAB], [2**63], [True], "a", [1] * 1025]),
    (
        "logit_bias",
        [
            {"x": 1},
            {"100": 1},
            {"-1": 1},
            {"1": 101},
            {"1": None},
            [1],
            {"9" * 50: 1},
            {"01": 1},
            {"1": float("inf")},
            {str(i): 1 for i in range(1025)},
        ],
    ),
    ("allowed_token_ids", [[], [VOCAB], [-1], 5]),
    ("min_tokens", [-1, 17, "a"]),
    ("ignore_eos", [1]),
    ("skip_special_tokens", ["no"]),
    ("include_stop_str_in_output", [0]),
    ("priority", [2**31, "high"]),
    ("cache_salt", ["", "a b", "x" * 129, 4, "\n"]),
    ("model", [3]),
    ("max_tokens", [0, -1, 2**63, "a"]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_a_bad_value_is_a_400_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**{name: value})
    assert (caught.value.status, caught.value.param) == (400, name)
    assert name in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize("name", sorted(UNSERVED))
def test_known_fields_are_refused_by_name_or_without_effect(name: str) -> None:
    if name in ("prompt", "messages"):
        return  # every request of the one endpoint has the one, and of the other the other: see below
    parse = chat if name == "echo" else completion
    neutral = UNSERVED[name].neutral
    for value in (None, *(neutral or ())):
        assert parse(**{name: value}).ignored == []
    wish = {name: [{"real": "wish"}]}
    if neutral is None:
        assert parse(**wish).ignored == [name]
        return
    with pytest.raises(ApiError) as caught:
        parse(**wish)
    assert (caught.value.status, caught.value.param) == (400, name)
    assert name in caught.value.message


def test_echo() -> None:
    assert completion(echo=True, max_tokens=0).max_tokens == 0 and completion(echo=True).max_tokens == 16
    with pytest.raises(ApiError, match="max_tokens 0 needs echo: true or prompt_logprobs"):
        completion(max_tokens=0)
    with pytest.raises(ApiError) as caught:
        completion(echo=True, max_tokens=0, min_tokens=1)
    assert caught.value.param == "min_tokens"
    with pytest.raises(ApiError, match="echo is not served here"):
        chat(echo=True)


def test_what_is_asked_of_prompts() -> None:
    """`echo` beside logprobs asks for the prompt's too; the larger number counts."""
    for fields, wanted in (
        ({}, None), ({"logprobs": 3}, None), ({"echo": True}, None), ({"echo": True, "logprobs": 0}, 0),
        ({"prompt_logprobs": 2}, 2), ({"prompt_logprobs": 2, "echo": True, "logprobs": 3}, 3),
        ({"prompt_logprobs": 4, "echo": True, "logprobs": 3}, 4), ({"prompt_logprobs": 1, "max_tokens": 0}, 1),
    ):  # fmt: skip
        request = completion(**fields)
        assert request.params.prompt_logprobs == wanted
        assert request.prompt_logprobs == fields.get("prompt_logprobs")
        assert request.params.logprobs == fields.get("logprobs")
    assert chat(prompt_logprobs=2).params.prompt_logprobs == 2
    for parse in (completion, chat):
        with pytest.raises(ApiError, match="prompt_logprobs is not served beside stream"):
            parse(prompt_logprobs=2, stream=True)


def test_best_of() -> None:
    request = completion(n=2, best_of=3)
    assert (request.n, request.best_of, request.params.logprobs, request.shows_logprobs) == (2, 3, 0, False)
    assert completion(best_of=3, logprobs=2).params.logprobs == 2 and completion().best_of == 1
    assert completion(n=3, best_of=3, stream=True).best_of == 3 and chat(n=2, best_of=2).best_of == 2
    for parse, fields, words in (
        (completion, {"n": 3, "best_of": 2}, "best_of is 2, below n = 3"),
        (completion, {"best_of": 2, "stream": True}, "without stream alone"),
        (chat, {"best_of": 2}, "served by /v1/completions"),
        (completion, {"best_of": 128, "prompt": ["x"] * 9}, "best_of times the number of prompts is 1152"),
    ):
        with pytest.raises(ApiError, match=words) as caught:
            parse(**fields)
        assert caught.value.param == "best_of"


def test_fields_of_the_other_endpoint() -> None:
    for parse, name in ((completion, "messages"), (chat, "prompt")):
        with pytest.raises(ApiError, match=f"{name} is not served here; give") as caught:
            parse(**{name: [1]})
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value", "works"),
    [("grammar_lazy", True, "leave it out"), ("structural_tag", {}, "leave it out"), ("n_predict", 9, "give max_tokens"),
     ("repeat_penalty", 1.1, "give repetition_penalty"), ("enable_thinking", False, "chat_template_kwargs"),
     ("typical_p", 0.9, "give 1.0"), ("mirostat", True, "give 0")],
)  # fmt: skip
def test_what_works_in_place_of_a_refused_field(name: str, value: Any, works: str) -> None:
    with pytest.raises(ApiError, match=name) as caught:
        completion(**{name: value})
    assert works in caught.value.message


def test_numbers_that_ask_nothing_may_be_written_either_way() -> None:
    assert completion(typical_p=1, mirostat=0.0, min_keep=1.0, n=1.0, best_of=1).ignored == []


def test_defaults() -> None:
    request = completion()
    assert (request.max_tokens, request.n, request.stream, request.params.temperature) == (16, 1, False, 1.0)
    assert request.params.logprobs is None and request.add_special_tokens
    request = chat()
    assert request.max_tokens is None and not request.add_special_tokens


def test_null_is_absent() -> None:
    names = ["temperature", "n", "stop", "seed", "logit_bias", "max_tokens", "stream", "stream_options", "cache_salt"]
    assert completion(**dict.fromkeys(names)) == completion()


def test_values_arrive() -> None:
    params = completion(
        temperature=0, top_k=-1, top_p=0.5, min_p=0.1, repetition_penalty=1.1, frequency_penalty=1, presence_penalty=-1,
        logit_bias={"5": -100}, allowed_token_ids=[1, 2], seed=7, stop_token_ids=[3], ignore_eos=True, logprobs=3,
        min_tokens=2, max_tokens=9,
    ).params  # fmt: skip
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 0, 0.5, 0.1)
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.1, 1, -1)
    assert (params.logit_bias, params.allowed_token_ids, params.seed) == ({5: -100}, [1, 2], 7)
    assert (params.stop_token_ids, params.ignore_eos, params.logprobs) == ([3], True, 3)
    assert (params.min_tokens, params.max_tokens) == (2, 9)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    "prompt", [None, [], 5, {}, [[]], ["a", 1], [1, "a"], [[1], "a"], [VOCAB], [-1], [True], [[1.5]], ["a"] * 1025]
)
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"), ([], "messages"), ("hi", "messages"), ([3], "messages[0]"),
        ([{"role": "b" * 65, "content": "x"}], "messages[0].role"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([{"role": "user<|end|>", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": {"id": "a"}}], "messages[1].tool_calls"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{"type": "custom"}]}], "messages[1].tool_calls[0].type"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].id"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages[1].tool_calls[0].function"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": ""}}]}],
         "messages[1].tool_calls[0].function.name"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": 5}}]}],
         "messages[1].tool_calls[0].function.arguments"),
        ([*MESSAGES, {"role": "assistant", "function_call": {"arguments": "{}"}}], "messages[1].function_call.name"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{}], "function_call": {"name": "f"}}],
         "messages[1].function_call"),
        ([{"role": "tool", "tool_call_id": "a"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}], "messages[0].content[0].type"),
        ([{"role": "assistant", "content": [{"type": "refusal"}]}], "messages[0].content[0].refusal"),
        ([{"role": "assistant", "refusal": 5}], "messages[0].content"),
    ],
)  # fmt: skip
def test_bad_messages(messages: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=messages)
    assert caught.value.param == param


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages == [{"role": "user", "content": "a\nb"}]


def test_what_an_assistant_refused_is_part_of_the_history() -> None:
    said = [{"type": "text", "text": "Well."}, {"type": "refusal", "refusal": "I cannot."}]
    history = [
        *MESSAGES,
        {"role": "assistant", "content": said},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]
    assert [one["content"] for one in chat(messages=history).messages] == ["hi", "Well.\nI cannot.", "No."]


def test_fields_of_a_message_reach_the_template_or_are_named() -> None:
    given = {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "2 + 2",
        "name": "a",
        "annotations": [],
        "weight": None,
    }
    request = chat(messages=[*MESSAGES, given, given], mood="calm")
    assert (
        request.messages[1:]
        == [{"role": "assistant", "content": "4", "reasoning": "2 + 2", "reasoning_content": "2 + 2", "name": "a"}] * 2
    )
    assert request.ignored == ["messages.annotations", "mood"]
    for name, value in (("prefix", True), ("partial", True), ("reasoning", 5), ("tool_call_id", [1])):
        with pytest.raises(ApiError) as caught:
            chat(messages=[{"role": "assistant", "content": "a", name: value}])
        assert caught.value.param == f"messages[0].{name}"


def test_template_arguments_are_an_object() -> None:
    assert chat(chat_template_kwargs={"a": 1}).template_arguments == {"a": 1}
    with pytest.raises(ApiError) as caught:
        chat(chat_template_kwargs=[1])
    assert caught.value.param == "chat_template_kwargs"


def test_chat_logprobs() -> None:
    assert chat().params.logprobs is None
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).params.logprobs == 4
    with pytest.raises(ApiError, match="top_logprobs"):
        chat(top_logprobs=4)


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=3, max_completion_tokens=5).max_tokens == 5


def test_min_tokens_without_max_tokens() -> None:
    assert chat(min_tokens=500).params.min_tokens == 500


def test_fields_without_effect_are_listed() -> None:
    assert completion(frobnicate=1, user="me", metadata={}, top_k=None).ignored == ["frobnicate", "user", "metadata"]
    assert completion(add_generation_prompt=True).ignored == ["add_generation_prompt"]
    assert chat(add_generation_prompt=True).ignored == []


def test_a_number_beyond_64_bits_is_not_shown_as_null() -> None:
    with pytest.raises(ApiError, match="temperature must be a number from 0 to 2, for example 1; got infinity"):
        parse_completion(parse_body(b'{"prompt": "hi", "temperature": 1e999}'), VOCAB)


def test_stream_options() -> None:
    def options(**fields: Any) -> tuple[bool, bool]:
        request = completion(stream=True, stream_options=fields)
        return request.include_usage, request.continuous_usage

    assert options() == options(include_usage=False) == (False, False)
    assert completion(stream=True, stream_options={"include_obfuscation": False}).ignored == [
        "stream_options.include_obfuscation"
    ]
    assert options(include_usage=True, continuous_usage_stats=None) == (True, False)
    assert options(include_usage=True, continuous_usage_stats=True) == (True, True)
    both = {"include_usage": True, "continuous_usage_stats": "x"}
    for bad in ({"include_usage": 1}, {"continuous_usage_stats": True}, both):
        with pytest.raises(ApiError, match="stream_options") as caught:
            options(**bad)
        assert caught.value.param == f"stream_options.{list(bad)[-1]}"


def test_what_the_model_sets_for_requests_holds_where_they_do_not_say() -> None:
    own = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 40}
    body = {"messages": MESSAGES, "temperature": 0.2, "top_p": None}
    request = parse_chat(body, VOCAB, own)
    assert (request.params.temperature, request.params.top_p, request.params.top_k) == (0.2, 0.9, 0)
    assert (request.max_tokens, request.max_tokens_is_default) == (40, True)
    assert parse_chat({**body, "max_tokens": 300}, VOCAB, own).max_tokens == 300
    prompt = {"prompt": "hi"}
    assert parse_completion(prompt, VOCAB, own).max_tokens == 16
    assert parse_completion(prompt, VOCAB, {"max_tokens": 4}).max_tokens == 4


def test_fan_out_is_refused_fast() -> None:
    started = time.perf_counter()
    for fields in ({"n": 10**9}, {"prompt": ["x"] * 10**6}, {"best_of": 10**6}, {"logprobs": 10**6},
                   {"prompt_logprobs": 10**6}, {"best_of": 128, "prompt": ["x"] * 1024}, {"n": 128, "prompt": ["x"] * 1024}):  # fmt: skip
        with pytest.raises(ApiError):
            completion(**fields)
    assert time.perf_counter() - started < 0.25


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000, b'{"n": 1' + b"0" * 5000 + b"}"]
)
def test_bad_bodies(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(parse_body(body), VOCAB)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),  # 1e999 is infinity
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SAMPLED = {
    "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "min_p": st.floats(0, 1), "top_k": st.integers(-1, 2**31 - 1),
    "repetition_penalty": st.floats(1e-5, 2), "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.integers(-2, 2),
    "seed": st.integers(-(2**63), 2**63 - 1), "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1).map(str), st.floats(-100, 100), max_size=3),
    "max_tokens": st.integers(1, 2**63 - 1), "min_tokens": st.integers(0, 3), "logprobs": st.integers(0, 20),
}  # fmt: skip
NAMES = sorted({*(name for name, _ in BAD), *SAMPLED, "messages", "prompt", "top_logprobs", *UNSERVED})


@given(fields=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5))
def test_any_json_is_taken_or_refused(fields: dict[str, Any]) -> None:
    for parse in (completion, chat):
        try:
            parse(**fields)
        except ApiError as error:
            assert error.status == 400 and error.param
            json.dumps(error.body())


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | JSON},
    optional={name: st.lists(st.dictionaries(st.sampled_from(["type", "text", "refusal"]), JSON | st.sampled_from(["text", "refusal"])))
              | JSON for name in sorted(MESSAGE_FIELDS - {"role"})},
)  # fmt: skip


@given(messages=st.lists(MESSAGE | JSON, max_size=3))
def test_any_history_is_taken_or_refused(messages: list[Any]) -> None:
    try:
        request = chat(messages=messages)
    except ApiError as error:
        assert error.status == 400 and error.param.startswith("messages")
    else:
        assert all(isinstance(one["content"], str) for one in request.messages)


@given(fields=st.fixed_dictionaries({}, optional=SAMPLED))
def test_what_is_taken_arrives_in_the_parameters(fields: dict[str, Any]) -> None:
    try:
        params = completion(**fields).params
    except ApiError as error:
        assert error.param == "min_tokens" and fields["min_tokens"] > fields["max_tokens"]
        return
    expected = {**fields, "logit_bias": {int(key): value for key, value in fields.get("logit_bias", {}).items()}}
    expected["top_k"] = max(fields.get("top_k", 0), 0)
    expected["temperature"] = 0 if fields.get("temperature", 1) < 1e-5 else fields.get("temperature", 1)
    assert params == SamplingParams(**expected)
    assert {name: getattr(params, name) for name in expected} == expected
