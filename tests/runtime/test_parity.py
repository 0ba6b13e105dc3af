"""The engine against transformers' `generate`, greedy, float32, on a real model; and against itself.

Every way of running (batching, chunking, caching, preempting, compiling, merging) must give the same tokens.
A difference is allowed only where the two likeliest logits are nearer than TIE, and is printed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.compiler.model.source import resolve_model
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM
from tests.prompts import PROMPTS

pytestmark = pytest.mark.timeout(900)  # the first test compiles the model

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_TOKENS = 32  # over a block's end at least twice
TIE = 1e-3
FEW = PROMPTS[1::4]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def reference(request, config_of, built: BuiltModel, model) -> tuple[list[list[int]], list[list[int]], torch.nn.Module]:
    """(prompt ids, generated ids) of transformers in one batch padded on the left, and its model."""
    llm = LLM(config_of(), built=built)
    prompts = [llm.tokenizer.encode(prompt) for prompt in (PROMPTS if request.param == "all" else FEW)]
    longest = max(map(len, prompts))
    # As with ignore_eos: EOS is a token like others, not a forbidden one. On the model, whose own EOS would replace a None.
    with torch.inference_mode(), mock.patch.object(model.generation_config, "eos_token_id", None):
        outputs = model.generate(
            torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return prompts, outputs[:, longest:].tolist(), model


def generate(config: Config, built: BuiltModel, prompts: list[list[int]]) -> tuple[list[list[int]], LLM]:
    llm = LLM(config, built=built)
    outputs = [done.token_ids for done in llm.generate(prompts, GREEDY)]
    llm.engine.scheduler.check_integrity()
    return outputs, llm


def assert_same(prompts, got, expected, model) -> None:
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if mine == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b)
        ids = torch.tensor([prompts[index] + theirs[:at]])
        with torch.inference_mode():
            top = model(ids).logits[0, -1].float().topk(2).values
        gap = (top[0] - top[1]).item()
        print(f"prompt {index} differs at token {at}: top-2 logits are {gap:.2e} apart")
        assert gap < TIE, f"prompt {index} differs at token {at} where the top-2 logits are {gap:.2e} apart"


def test_equals_transformers_one_by_one(config_of, built, reference) -> None:
    prompts, expected, model = reference
    if len(prompts) == len(FEW):
        prompts, expected = prompts[::2], expected[::2]
    assert_same(prompts, generate(config_of(max_num_seqs=1), built, prompts)[0], expected, model)


@pytest.mark.parametrize(
    "overrides",
    [dict(), dict(max_num_batched_tokens=32), dict(enable_prefix_caching=False)],
    ids=["batch16", "chunk32", "no-prefix-cache"],
)
def test_scheduling_does_not_change_tokens(config_of, built, reference, overrides) -> None:
    prompts, expected, model = reference
    assert_same(prompts, generate(config_of(**overrides), built, prompts)[0], expected, model)


def test_preemption_does_not_change_tokens(config_of, built, reference) -> None:
    prompts, expected, model = reference
    few = len(prompts) == len(FEW)
    tight = dataclasses.replace(built, num_blocks=14 if few else 34, max_model_len=128 if few else 256)
    got, llm = generate(config_of(), tight, prompts)
    assert llm.engine.scheduler.counters.preemptions > 0
    assert_same(prompts, got, expected, model)


def test_cache_hits_do_not_change_tokens(config_of, built, reference) -> None:
    prompts, expected, model = reference
    llm = LLM(config_of(), built=built)
    shared = max(prompts, key=len)
    first, again = (llm.generate([shared], GREEDY)[0] for _ in range(2))
    assert first.cached_tokens == 0 and again.cached_tokens == (len(shared) - 1) // 16 * 16 > 0
    assert_same([shared] * 2, [first.token_ids, again.token_ids], [expected[prompts.index(shared)]] * 2, model)


def test_uncompiled_gives_the_same_tokens(config_of, built, reference) -> None:
    prompts, expected, model = reference
    compiled, built.step.forward = built.step.forward, built.step.paged_model
    try:
        assert_same(prompts, generate(config_of(), built, prompts)[0], expected, model)
    finally:
        built.step.forward = compiled


def test_plain_linears_give_the_same_tokens(config_of, reference) -> None:
    prompts, expected, model = reference
    plain = build_compiled(compiler_options(config_of(merge_linears=False, compile=False)), progress=False)
    assert_same(prompts, generate(config_of(merge_linears=False), plain, prompts)[0], expected, model)


def test_the_converted_model_is_found_again() -> None:
    """The conversion is done once: another resolve gives the same folder and writes nothing there."""

    def resolved() -> dict[Path, int]:
        folder = resolve_model(MODEL, cache_dir=Path("~/.cache/pagegraph").expanduser())
        return {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    first = resolved()
    assert "config.json" in {path.name for path in first} and resolved() == first
