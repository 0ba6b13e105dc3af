"""Guessing on a real model: whoever guesses and however requests are run, the tokens are those of a run without."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compiler import build as builder
from runtime.llm import LLM, Completion
from runtime.protocol import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from prompts import PROMPTS  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # the first test compiles the model

NUM_TOKENS = 64
TIE = 1e-3  # as in test_parity: a step of another size rounds otherwise
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
WAYS = {
    "batch16": dict(),
    "alone": dict(max_num_seqs=1),
    "chunk32": dict(max_num_batched_tokens=32),
    "no-prefix-cache": dict(enable_prefix_caching=False),
    "preempting": dict(tight=True),
}


@pytest.fixture(scope="module")
def expected(config_of, built: builder.BuiltModel) -> list[Completion]:
    return LLM(config_of(), built=built).generate(PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def logits_of(built: builder.BuiltModel):
    model = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.float32).eval()

    def after(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, -1].float()

    return after


def assert_same(got: list[Completion], expected: list[Completion], logits_of) -> None:
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if mine.token_ids == theirs.token_ids:
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids)) if a != b)
        top = logits_of(theirs.prompt_token_ids + theirs.token_ids[:at]).topk(2).values
        gap = (top[0] - top[1]).item()
        print(f"prompt {index} differs at token {at}: top-2 logits are {gap:.2e} apart")
        assert gap < TIE, f"prompt {index} differs at token {at} where the top-2 logits are {gap:.2e} apart"


def run(config_of, built, way: str, prompts: list[str] = PROMPTS, params=GREEDY, **speculative) -> tuple[list[Completion], LLM]:
    overrides = dict(WAYS[way])
    if overrides.pop("tight", False):
        built = dataclasses.replace(built, num_blocks=34, max_model_len=256)
    llm = LLM(config_of(**{"num_speculative_tokens": 4, **overrides, **speculative}), built=built)
    done = llm.generate(prompts, params)
    scheduler = llm.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.counters.accepted > 0 and scheduler.counters.guesses > scheduler.counters.accepted
    assert (scheduler.counters.preemptions > 0) == (way == "preempting")
    return done, llm


@pytest.mark.parametrize("way", ["batch16", "chunk32", "preempting"])
def test_prompt_lookup_changes_no_token(config_of, built, expected, logits_of, way) -> None:
    assert_same(run(config_of, built, way, speculative_method="ngram")[0], expected, logits_of)
