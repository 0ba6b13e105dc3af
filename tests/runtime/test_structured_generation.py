"""The real model under grammars: answers parse and are valid, and how they are made changes no token."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.step.state import NgramRange
from pagegraph.runtime.llm import LLM, Completion
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.structured_output import StructuredOutputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test compiles the model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Paris", "Rome", "Oslo"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "city", "tags", "born"],
    "additionalProperties": False,
}
TASKS = [
    "Describe a person as JSON.",
    "Anna is 31 and lives in Oslo.",
    "Write about a friend.",
    "A record of a writer:",
]
WAYS: dict[str, dict[str, Any]] = {
    "chunk32": dict(max_num_batched_tokens=32),
    "alone": dict(max_num_seqs=1),
    "preempting": dict(tight=True),
    "ngram": dict(speculative_method="ngram", num_speculative_tokens=4),
    "suffix": dict(speculative_method="suffix", num_speculative_tokens=4),
    "ngram, as many as pay": dict(speculative_method="ngram"),
    "suffix, preempting": dict(speculative_method="suffix", num_speculative_tokens=4, tight=True),
}


@pytest.fixture(scope="module", autouse=True)
def built(built: BuiltModel) -> Iterator[BuiltModel]:
    """The model of all tests, whose steps look up and accept draft tokens meanwhile."""
    built.step.state.allow_drafts(15, NgramRange(2, 5))
    yield built
    built.step.state.allow_drafts(0, None)


def requests(count: int) -> tuple[list[str], list[SamplingParams]]:
    """Greedy ones and sampled ones, every fourth free text."""
    held = StructuredOutputs(json=PERSON)
    params = [
        SamplingParams(
            max_tokens=24 if number % 4 == 3 else 200,
            temperature=(0.0, 0.7, 1.0, 0.0)[number % 4],
            seed=number,
            structured_outputs=None if number % 4 == 3 else held,
        )
        for number in range(count)
    ]
    return [f"{TASKS[number // 4 % len(TASKS)]} ({number})" for number in range(count)], params


def made(config_of, built: BuiltModel, way: dict[str, Any], count: int) -> tuple[list[Completion], LLM]:
    overrides = dict(way)
    if overrides.pop("tight", False):
        built = dataclasses.replace(built, num_blocks=17, max_model_len=256)
    llm = LLM(config_of(**overrides), built=built)
    prompts, params = requests(count)
    done = llm.generate(llm_prompts(llm, prompts), params)
    llm.engine.scheduler.check_integrity()
    return done, llm


def llm_prompts(llm: LLM, prompts: list[str]) -> list[list[int]]:
    return [llm.tokenizer.apply_chat([{"role": "user", "content": prompt}]) for prompt in prompts]


def check(done: list[Completion]) -> None:
    validator = jsonschema.Draft202012Validator(PERSON, format_checker=jsonschema.FormatChecker())
    for number, one in enumerate(done):
        if number % 4 != 3:
            assert one.finish_reason == "stop", one.text
            validator.validate(json.loads(one.text))


@pytest.fixture(scope="module")
def plain(config_of, built: BuiltModel) -> list[Completion]:
    return made(config_of, built, {}, 8)[0]


def test_answers_are_valid_beside_free_text(plain: list[Completion]) -> None:
    check(plain)


@pytest.mark.parametrize("way", ["suffix, preempting"])
def test_how_answers_are_made_changes_no_token(config_of, built, plain, way: str) -> None:
    same(config_of, built, plain, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", sorted(set(WAYS) - {"suffix, preempting"}))
def test_nor_does_any_other_way(config_of, built, plain, way: str) -> None:
    same(config_of, built, plain, way)


def same(config_of, built: BuiltModel, plain: list[Completion], way: str) -> None:
    done, llm = made(config_of, built, WAYS[way], len(plain))
    assert [one.token_ids for one in done] == [one.token_ids for one in plain]
    counters = llm.engine.scheduler.counters
    assert (counters.preemptions > 0) == ("preempting" in way)
    if "num_speculative_tokens" in WAYS[way]:
        assert counters.accepted > 0


@pytest.mark.slow
def test_two_hundred_of_two_hundred(config_of, built: BuiltModel) -> None:
    done, _ = made(config_of, built, {}, 268)
    held = [one for number, one in enumerate(done) if number % 4 != 3]
    assert len(held) == 201
    check(done)
