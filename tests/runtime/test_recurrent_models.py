"""Models with recurrent state through the whole engine: however steps are cut, tokens are those of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagegraph.compiler.build import build_compiled, build_model
from pagegraph.runtime.config import Config, load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.scheduler import state_snapshots
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import random_model
from tests.kernels.interpreter_process import InterpreterProcess

NEW = 12  # tokens
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
# Settings of the engine: one step for all prompts, chunks beside decodes, blocks for two sequences at a time.
CUT = {
    "whole": dict(max_num_batched_tokens=512),
    "chunks": dict(max_num_batched_tokens=16),
    "preempted": dict(max_num_batched_tokens=64, num_blocks=14),
}


@pytest.fixture
def tiny(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., tuple[torch.nn.Module, Callable[..., Config]]]:
    """A function from a tiny model's name to transformers' own and a function from settings to a configuration.

    words: it says the first so many tokens alone, so that what it says repeats.
    """

    def make(name: str, words: int | None = None) -> tuple[torch.nn.Module, Callable[..., Config]]:
        folder = tmp_path / name
        shutil.copytree(tokenizer_folder, folder)
        stock = random_model(tiny_config(name))
        if words is not None:
            with torch.no_grad():
                stock.get_output_embeddings().weight[words:] = 0
        stock.save_pretrained(folder)

        def config_of(**more: object) -> Config:
            fixed = dict(
                device="cpu", dtype="float32", max_num_seqs=4, block_size=8, num_blocks=100, max_model_len=96, compile=False,
                inter_token_target_ms="none",
            )  # fmt: skip
            return load_config(str(folder), {**fixed, **more}).config

        return stock, config_of

    return make


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (37, 1, 20, 44, 9, 30)]


@torch.inference_mode()
def continued(stock: torch.nn.Module, prompt: list[int]) -> list[int]:
    """What the model says next, each token by a forward of all before it."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(stock(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def likeliest(stock: torch.nn.Module, prompt: list[int], tokens: list[int]) -> list[int]:
    """What the model says at the place of each token, in one forward: the tokens themselves where they are its own."""
    logits = stock(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist()


def check(expected: list[list[int]], llm: LLM) -> None:
    """All prompts at once, and once more in the slots that they leave, one of them aborted before."""
    stream = llm.stream(prompts()[0], GREEDY)
    next(stream)
    stream.close()
    for _ in range(2):
        assert [done.token_ids for done in llm.generate(prompts(), GREEDY)] == expected


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "mamba2"])
def test_tokens_are_those_of_transformers(tiny, name: str) -> None:
    stock, config_of = tiny(name)
    built = build_model(compiler_options(config_of()), progress=False)
    expected = [done.token_ids for done in LLM(config_of(), built=built).generate(prompts(), GREEDY)]
    for prompt, tokens in zip(prompts(), expected):
        assert len(tokens) == NEW and likeliest(stock, prompt, tokens) == tokens
    preempted = 0
    for cut in CUT.values():
        config = config_of(**cut)
        llm = LLM(config, built=replace(built, num_blocks=config.num_blocks))
        check(expected, llm)
        preempted += llm.engine.scheduler.counters.preemptions
        llm.engine.scheduler.check_integrity()
    assert preempted or name == "mamba2"  # whose blocks never run out


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_the_next_turn_goes_on_from_a_kept_state(tiny, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(state_snapshots, "LEAST_TOKENS", 16)
    stock, config_of = tiny(name)
    slot = build_model(compiler_options(config_of()), progress=False).slot_bytes
    config = config_of(max_num_batched_tokens=64, state_cache_memory=2 * slot)
    llm = LLM(config, built=build_model(compiler_options(config), progress=False))
    scheduler = llm.engine.scheduler

    def cached(prompt: list[int]) -> int:
        before = scheduler.counters.prefix_hits
        [done] = llm.generate([prompt], GREEDY)
        assert len(done.token_ids) == NEW and done.token_ids == likeliest(stock, prompt, done.token_ids)
        return scheduler.counters.prefix_hits - before

    first = prompts()[3]
    turn = [*first, *continued(stock, first), 7, 8, 9]
    assert (len(first), cached(first), cached(turn), cached(turn)) == (44, 0, 40, 56)
    other = [*turn[:33], 9, 9, 9]  # its blocks are there up to 32, a state is not; the one after it finds both
    assert (cached(other), cached([*turn[:34], 5, 5])) == (0, 32)
    assert len(scheduler.snapshots) == 2 and cached(first) == 32  # the state behind 40 gave way
    scheduler.check_integrity()


WORDS = 8
# Tokens as they are sampled with the forward, and behind it.
ASKED = [
    dict(), dict(temperature=0.5, seed=1), dict(temperature=0.4, seed=2, top_p=0.9), dict(logprobs=1),
    dict(allowed_token_ids=[4, 5, 6], temperature=0.5, seed=3), dict(),
]  # fmt: skip


# Ops that a layer with state calls on CUDA, and the modules of their kernels.
CUDA_OPS = {"causal_conv": "conv", "gated_delta": "cuda", "selective_scan": "cuda", "count_states": "drafts"}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[InterpreterProcess]:
    process = InterpreterProcess()
    yield process
    process.close()


def interpreted(process: InterpreterProcess, module: str, function: str) -> Callable[..., torch.Tensor]:
    """The launcher as an op on CPU tensors: what it mutates is copied back."""

    def call(*given: object) -> torch.Tensor:
        out, after = process.call(f"pagegraph.kernels.state.{module}", function, *given)
        for one, changed in zip(given, after):
            if isinstance(one, torch.Tensor):
                one.copy_(changed)
        return out

    return call


def drafted_prompts() -> list[list[int]]:
    return [[token % WORDS for token in prompt] for prompt in prompts()]


@pytest.mark.parametrize(
    "name, method",
    [
        ("qwen3_next", "ngram"), ("falcon_h1", "suffix"), ("lfm2", "ngram"), ("mamba2", "draft"),
        pytest.param("mamba2", "ngram", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_draft_tokens_change_no_token(tiny, monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    monkeypatch.setattr(state_snapshots, "LEAST_TOKENS", 16)
    params = [SamplingParams(**{"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, **one}) for one in ASKED]
    _, config_of = tiny(name, WORDS)
    drafting: dict[str, object] = dict(speculative_method=method, num_speculative_tokens=3, prompt_lookup_min=1)
    if method == "draft":
        drafting["speculative_model"] = tiny("llama", WORDS)[1]().model
    built = build_model(compiler_options(config_of(**drafting)), progress=False)
    expected = LLM(config_of(), built=built).generate(drafted_prompts(), params)
    for cut in ("chunks", "preempted"):
        config = config_of(**{**CUT[cut], **drafting})
        llm = LLM(config, built=replace(built, num_blocks=config.num_blocks))
        stream = llm.stream(drafted_prompts()[1], params[0])
        for _ in range(5):
            next(stream)
        stream.close()
        for again in (False, True):  # the second time from kept states, and in the slots that others have left
            hits = llm.engine.scheduler.counters.prefix_hits
            got = llm.generate(drafted_prompts(), params)
            assert [one.token_ids for one in got] == [one.token_ids for one in expected], (cut, again)
            assert not again or cut == "preempted" or llm.engine.scheduler.counters.prefix_hits > hits
        counters = llm.engine.scheduler.counters
        assert 20 < counters.accepted < counters.draft_tokens - 20 and all(counters.accepted_at)
        assert counters.preemptions or cut != "preempted" or name == "mamba2"
        llm.engine.scheduler.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_draft_tokens_change_no_token_with_the_kernels_of_cuda(
    tiny, interpreter: InterpreterProcess, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Through Triton's interpreter, in the engine's own steps on a CPU; what is expected is of the CPU's ops, without draft tokens."""
    _, config_of = tiny(name, WORDS)
    prompts, params = drafted_prompts()[1:3], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    config = config_of(speculative_method="ngram", num_speculative_tokens=3, prompt_lookup_min=1)
    expected = LLM(config_of()).generate(prompts, params)
    built = build_model(compiler_options(config), progress=False)
    for op, place in CUDA_OPS.items():
        monkeypatch.setattr(torch.ops.pagegraph, op, interpreted(interpreter, place, op), raising=False)
    llm = LLM(config, built=built)
    got = llm.generate(prompts, params)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    counters = llm.engine.scheduler.counters
    assert 1 < counters.accepted < counters.draft_tokens - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "name, compiled",
    [
        ("qwen3_next", False), ("kimi_linear", False), ("nemotron_h", False), ("falcon_h1", False), ("lfm2", False), ("jamba", False),
        ("qwen3_next", True), ("nemotron_h", True),
    ],
)  # fmt: skip
def test_draft_tokens_change_no_token_on_cuda(
    tiny, no_other_models: None, monkeypatch: pytest.MonkeyPatch, name: str, compiled: bool
) -> None:
    """With CUDA graphs; what is expected is of a build without draft tokens."""
    monkeypatch.setattr(state_snapshots, "LEAST_TOKENS", 16)
    params = [SamplingParams(**{"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, **one}) for one in ASKED]
    _, config_of = tiny(name, WORDS)
    plain = LLM(config_of(device="cuda", compile=compiled))
    expected = plain.generate(drafted_prompts(), params)
    plain.built.close()
    drafting = dict(speculative_method="ngram", num_speculative_tokens=3, prompt_lookup_min=1)
    built = build_compiled(compiler_options(config_of(device="cuda", compile=compiled, **drafting)), progress=False)
    for cut, settings in CUT.items():
        config = config_of(device="cuda", compile=compiled, **{**settings, **drafting})
        llm = LLM(config, built=replace(built, num_blocks=config.num_blocks))
        for again in (False, True):  # the second time from kept states, and in the slots that others have left
            got = llm.generate(drafted_prompts(), params)
            assert [one.token_ids for one in got] == [one.token_ids for one in expected], (cut, again)
        counters = llm.engine.scheduler.counters
        assert 20 < counters.accepted < counters.draft_tokens - 20 and all(counters.accepted_at)
        llm.engine.scheduler.check_integrity()
    assert built.step.counts.graphed > 20
    built.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "lfm2", "nemotron_h", "jamba", "mamba2"])
def test_compiled_and_stored(tiny, no_other_models: None, name: str) -> None:
    stock, config_of = tiny(name)
    config, expected = config_of(compile=True), [continued(stock, prompt) for prompt in prompts()]
    for stored in (False, True):
        built = build_model(compiler_options(config), progress=False)
        assert built.is_stored == stored
        built.compile()
        check(expected, LLM(config, built=built))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_draft_tokens_of_a_compiled_model(tiny, no_other_models: None, name: str) -> None:
    _, config_of = tiny(name, WORDS)
    config = config_of(compile=True, speculative_method="ngram", num_speculative_tokens=3, prompt_lookup_min=1)
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    built = build_model(compiler_options(config), progress=False)
    expected = LLM(config_of(), built=built).generate(drafted_prompts(), params)
    for stored in (False, True):
        built = build_model(compiler_options(config), progress=False)
        assert built.is_stored == stored
        built.compile()
        llm = LLM(config, built=built)
        got = llm.generate(drafted_prompts(), params)
        assert [one.token_ids for one in got] == [one.token_ids for one in expected]
        assert llm.engine.scheduler.counters.accepted > 20


@pytest.mark.parametrize(
    "settings, why",
    [
        (dict(speculative_method="draft", speculative_model="itself"), "draft tokens that its target rejects .* ngram"),
        (dict(deterministic=True, compile=True), "set deterministic to false"),
    ],
)
def test_what_it_is_not_served_with(tiny, settings: dict, why: str) -> None:
    _, config_of = tiny("mamba2")
    if "speculative_model" in settings:
        settings = {**settings, "speculative_model": config_of().model}
    with pytest.raises(ValueError, match=why):
        build_model(compiler_options(config_of(**settings)), progress=False)
