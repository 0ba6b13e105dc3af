"""Drafting on a real model: whoever proposes and however requests are run, the tokens are those of a run without."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig

from pagegraph.compiler.build import BuiltModel, build_model
from pagegraph.compiler.step.state import NgramRange
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM, Completion
from tests.prompts import PROMPTS

pytestmark = pytest.mark.timeout(900)  # the first test compiles the model

NUM_TOKENS = 64
TIE = 1e-3  # as in test_parity: a step of another size rounds otherwise
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
FEW, SHORT = (
    PROMPTS[::4],
    SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True),
)  # where all would take minutes
WAYS = {
    "batch16": dict(),
    "alone": dict(max_num_seqs=1),
    "chunk32": dict(max_num_batched_tokens=32),
    "no-prefix-cache": dict(enable_prefix_caching=False),
    "preempting": dict(tight=True),
}


@pytest.fixture(scope="module", autouse=True)
def built(built: BuiltModel) -> Iterator[BuiltModel]:
    """The model of all tests, whose steps look up and accept draft tokens meanwhile."""
    built.step.state.allow_drafts(15, NgramRange(2, 5))
    yield built
    built.step.state.allow_drafts(0, None)


@pytest.fixture(scope="module")
def plain(config_of, built: BuiltModel):
    """A function from FEW or all PROMPTS to what the engine gives without draft tokens."""
    known: dict[int, list[Completion]] = {}

    def run(prompts: list[str], params: SamplingParams = SHORT) -> list[Completion]:
        if len(prompts) not in known:
            known[len(prompts)] = LLM(config_of(), built=built).generate(prompts, params)
        return known[len(prompts)]

    return run


@pytest.fixture(scope="module")
def cut(model, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the first two layers of the model."""
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:2]
    short.config.num_hidden_layers = 2
    if getattr(short.config, "layer_types", None):
        short.config.layer_types = short.config.layer_types[:2]
    short.save_pretrained(folder := tmp_path_factory.mktemp("draft"))
    return str(folder)


@pytest.fixture(scope="module")
def drafted(config_of, cut: str) -> BuiltModel:
    """Uncompiled, with a draft model."""
    return build_model(compiler_options(config_of(compile=False, speculative_model=cut)), progress=False)


def assert_same(got: list[Completion], expected: list[Completion], model: torch.nn.Module) -> None:
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if mine.token_ids == theirs.token_ids:
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids)) if a != b)
        with torch.inference_mode():
            logits = model(torch.tensor([theirs.prompt_token_ids + theirs.token_ids[:at]])).logits[0, -1].float()
        top = logits.topk(2).values
        gap = (top[0] - top[1]).item()
        print(f"prompt {index} differs at token {at}: top-2 logits are {gap:.2e} apart")
        assert gap < TIE, f"prompt {index} differs at token {at} where the top-2 logits are {gap:.2e} apart"


def run(
    config_of, built, way: str, prompts: list[str], params: SamplingParams | list[SamplingParams] = SHORT, **speculative
) -> tuple[list[Completion], LLM]:
    overrides = dict(WAYS[way])
    if overrides.pop("tight", False):
        few = len(prompts) < len(PROMPTS)
        built = dataclasses.replace(built, num_blocks=14 if few else 34, max_model_len=128 if few else 256)
    llm = LLM(config_of(**{"num_speculative_tokens": 4, **overrides, **speculative}), built=built)
    done = llm.generate(prompts, params)
    scheduler = llm.engine.scheduler
    scheduler.check_integrity()
    counters = scheduler.counters
    assert 0 < counters.accepted < counters.draft_tokens
    assert counters.saved_steps and counters.generated_tokens == sum(len(one.token_ids) for one in done)
    assert (counters.preemptions > 0) == (way == "preempting")
    return done, llm


@pytest.mark.parametrize("way", ["batch16", "preempting"])
def test_ngram_changes_no_token(config_of, built, plain, model, way) -> None:
    assert_same(run(config_of, built, way, FEW, speculative_method="ngram")[0], plain(FEW), model)


def test_remembered_outputs_change_no_token_and_are_drafted(config_of, built, plain, model) -> None:
    """The second time the whole output is known: most of it is drafted."""
    plain(FEW)  # before, as it writes the same blocks
    done, llm = run(config_of, built, "chunk32", FEW, speculative_method="suffix")
    assert_same(done, plain(FEW), model)
    before = dataclasses.replace(llm.engine.scheduler.counters)
    assert_same(llm.generate(FEW[:2], SHORT), plain(FEW)[:2], model)
    after = llm.engine.scheduler.counters
    assert after.accepted - before.accepted > 0.7 * (after.generated_tokens - before.generated_tokens)


def test_a_smaller_model_changes_no_token(config_of, drafted, cut, plain, model) -> None:
    speculative = dict(speculative_model=cut, compile=False, num_speculative_tokens=2)
    assert_same(run(config_of, drafted, "preempting", FEW, **speculative)[0], plain(FEW), model)


def test_every_parameter_means_what_it_does_without_draft_tokens(config_of, built) -> None:
    """Seeded draws, filters, penalties, bias, allowed ids, stops and log-probabilities, side by side."""
    asked = [
        dict(temperature=0.9, top_p=0.9, seed=1),
        dict(temperature=1.2, top_k=20, seed=2, logprobs=2),
        dict(repetition_penalty=1.3, frequency_penalty=0.5),
        dict(logit_bias={260: 4.0}, logprobs=0),
        dict(allowed_token_ids=list(range(200, 400)), temperature=0.7, seed=3),
        dict(min_tokens=12, ignore_eos=False, stop_token_ids=[28, 30]),
        dict(ignore_eos=False, stop_token_ids=[198]),
        dict(max_tokens=5, logprobs=1),
    ]
    params = [SamplingParams(**{"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **one}) for one in asked]
    prompts = PROMPTS[: len(params)]
    expected = LLM(config_of(), built=built).generate(prompts, params)
    got, _ = run(config_of, built, "batch16", prompts, params, speculative_method="ngram")
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.token_ids, mine.finish_reason, mine.stop_reason) == (
            theirs.token_ids,
            theirs.finish_reason,
            theirs.stop_reason,
        )
        assert [one.token_id for one in mine.logprobs] == [one.token_id for one in theirs.logprobs]
        assert [one.logprob for one in mine.logprobs] == pytest.approx(
            [one.logprob for one in theirs.logprobs], abs=1e-3
        )


def test_as_many_draft_tokens_as_pay_change_no_token(config_of, built, plain, model) -> None:
    llm = LLM(config_of(speculative_method="ngram", max_num_seqs=2), built=built)
    assert_same(llm.generate(FEW[:3], SHORT), plain(FEW)[:3], model)
    assert llm.engine.scheduler.counters.accepted > 0
    llm.engine.scheduler.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["ngram", "suffix", "draft", "ngram+draft", "suffix+draft"])
def test_whoever_proposes_and_however_it_runs(config_of, built, drafted, cut, plain, model, method, way) -> None:
    speculative: dict[str, object] = dict(speculative_method=method)
    if "draft" in method:
        built = drafted
        speculative.update(speculative_model=cut, compile=False)
    assert_same(run(config_of, built, way, PROMPTS, GREEDY, **speculative)[0], plain(PROMPTS, GREEDY), model)


def test_a_model_of_another_vocabulary_is_refused(config_of, tmp_path) -> None:
    LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 100 tokens.*one of 49152"):
        build_model(
            compiler_options(config_of(speculative_model=str(tmp_path), load_format="dummy", compile=False)),
            progress=False,
        )
