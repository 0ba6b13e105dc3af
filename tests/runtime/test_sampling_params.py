"""Sampling parameters: what none can hold, what a model sets for requests, and what fits its context."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.runtime.ipc.protocol import Submit, decode_to_engine, encode
from pagegraph.runtime.sampling_params import (
    RANGES,
    BadParameter,
    SamplingParams,
    check_ids,
    check_length,
    check_stop,
    model_defaults,
    own_seed,
    wrap_seed,
)

BAD = [
    ("temperature", [-1, 2.1, math.nan, math.inf, "hot", None, True, 10**400]),
    ("top_p", [-0.1, 1.1]),
    ("top_k", [-2, 1.5, 2**31]),
    ("min_p", [-0.1, 2]),
    ("repetition_penalty", [0, 1e-30, 2.5]),
    ("frequency_penalty", [3]),
    ("presence_penalty", [math.nan]),
    ("max_tokens", [0, -1, 1.5, "9"]),
    ("min_tokens", [-1, None, 17]),
    ("seed", [2**63, -(2**63) - 1, 0.5]),
    ("logprobs", [-1, 21]),
    (
        "logit_bias",
        [{3: math.inf}, {3: math.nan}, {3: -101}, {"3": 1}, {-1: 1}, {3: None}, [3], dict.fromkeys(range(1025), 1)],
    ),
    ("stop_token_ids", [[-1], ["a"], [True], 5, [1] * 1025]),
    ("allowed_token_ids", [[], [-1], 5]),
    ("ignore_eos", [1, None]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD for value in values])
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    if field in RANGES and field != "min_tokens":
        assert "for example" in str(caught.value)


def test_a_copy_and_a_message_are_checked_like_the_first() -> None:
    with pytest.raises(BadParameter, match="top_p"):
        msgspec.structs.replace(SamplingParams(), top_p=7)
    frame = msgspec.msgpack.encode(
        {"type": "submit", "request_id": "a", "token_ids": [1], "params": {"temperature": -1.0}}
    )
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        decode_to_engine(frame)


@pytest.mark.parametrize("value", [0, 1e-6, 9.9e-6, 1e-38, 5e-324])
def test_a_tiny_temperature_is_greedy_wherever_it_comes_from(value: float) -> None:
    assert SamplingParams(temperature=value).temperature == 0.0
    assert msgspec.structs.replace(SamplingParams(), temperature=value).temperature == 0.0
    frame = msgspec.msgpack.encode(
        {"type": "submit", "request_id": "a", "token_ids": [1], "params": {"temperature": value}}
    )
    assert decode_to_engine(frame).params.temperature == 0.0
    assert SamplingParams(temperature=1e-5).temperature == 1e-5


def test_numbers_of_other_kinds_become_ours() -> None:
    params = SamplingParams(temperature=1, top_k=40.0, top_p=np.float32(0.5), seed=np.int64(3), logit_bias={5: 1})
    assert params == SamplingParams(temperature=1.0, top_k=40, top_p=0.5, seed=3, logit_bias={5: 1.0})
    assert decode_to_engine(encode(Submit(request_id="a", token_ids=[1], params=params))).params == params
    assert SamplingParams(top_k=-1).top_k == 0 and SamplingParams(max_tokens=None, min_tokens=99).max_tokens is None


def test_ids_outside_the_vocabulary() -> None:
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[0, 9], allowed_token_ids=[9], logprobs=10).check_vocabulary(10)
    for field, value in {
        "logit_bias": {10: 1},
        "stop_token_ids": [10],
        "allowed_token_ids": [3, 2**40],
        "logprobs": 11,
    }.items():
        with pytest.raises(BadParameter, match=field):
            SamplingParams(**{field: value}).check_vocabulary(10)
    check_ids("prompt", [np.int64(3), 4], 10)
    for bad in ([10], [-1], [True], [1.0], "abc", None):
        with pytest.raises(BadParameter, match="prompt must"):
            check_ids("prompt", bad, 10)


def test_stop_strings() -> None:
    assert (check_stop(None), check_stop("a"), check_stop(["a", "b"]), check_stop(("a",))) == (
        [],
        ["a"],
        ["a", "b"],
        ["a"],
    )
    for bad in ("", [""], ["a", ""], [1], 5, ["a"] * 17, ["x" * 1025]):
        with pytest.raises(BadParameter, match="stop must"):
            check_stop(bad)


def test_what_a_model_sets_for_requests() -> None:
    file = {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 2048, "min_p": 0}
    assert model_defaults(file) == {"temperature": 0.6, "top_p": 0.9, "min_p": 0.0, "max_tokens": 2048}
    assert model_defaults({}) == {}
    with pytest.raises(
        ValueError, match="generation_config.json of the model: top_p must be .* set generation_config to none"
    ):
        model_defaults({"top_p": 1.5})


@pytest.mark.parametrize(
    ("length", "asked", "field", "works"),
    [
        (100, {}, "prompt", "at most 99"),
        (5000, {"num_chars": 10**6}, "prompt", "at most 99"),
        (90, {"max_tokens": 11}, "max_tokens", "max_tokens of at most 10"),
        (90, {"min_tokens": 11}, "min_tokens", "min_tokens of at most 10"),
    ],
)
def test_what_does_not_fit_the_context(length: int, asked: dict[str, int], field: str, works: str) -> None:
    with pytest.raises(BadParameter, match=works) as caught:
        check_length(length, 100, **asked)
    assert (caught.value.field, caught.value.code) == (field, "context_length_exceeded")
    # By these words clients know it: litellm's list of phrases, in lower case, and OpenAI's own error.
    assert "this model's maximum context length is 100 tokens" in str(caught.value).lower()
    assert str(length) in str(caught.value) and "max_model_len" in str(caught.value)


def test_what_fits_the_context() -> None:
    check_length(99, 100)
    check_length(99, 100, max_tokens=1, min_tokens=1)
    with pytest.raises(BadParameter, match="messages has no tokens"):
        check_length(0, 100, field="messages")


@given(st.integers(-(2**70), 2**70))
def test_a_seed_has_64_bits(value: int) -> None:
    wrapped = wrap_seed(value)
    assert np.int64(wrapped) == wrapped and (wrapped - value) % 2**64 == 0


@given(st.integers(0, 2**63 - 1), st.integers(1, 2**31))
def test_every_seed_of_an_engine_gives_its_sequences_seeds(engine_seed: int, number: int) -> None:
    seed = own_seed(engine_seed, number)
    SamplingParams(seed=seed)
    np.zeros(1, np.int64)[0] = seed
    assert own_seed(engine_seed, number + 1) != seed
    if engine_seed < 2**31:
        assert seed == (engine_seed << 32) + number
    assert own_seed(engine_seed ^ 2**40, number) != seed  # its upper half counts too


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(sorted(SamplingParams.__struct_fields__)), ANY, max_size=4))
def test_any_value_is_held_or_refused_by_name(fields: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**fields)
    except BadParameter as error:
        assert error.field in {*fields, "min_tokens"}
    else:
        assert decode_to_engine(encode(Submit(request_id="a", token_ids=[1], params=params))).params == params
