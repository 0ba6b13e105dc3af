"""Models with recurrent state through the whole engine: however steps are cut, tokens are those of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pagegraph.compiler.build import build_model
from pagegraph.runtime.config import Config, load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import random_model

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
    """A function from a tiny model's name to transformers' own and a function from settings to a configuration."""

    def make(name: str) -> tuple[torch.nn.Module, Callable[..., Config]]:
        folder = tmp_path / name
        shutil.copytree(tokenizer_folder, folder)
        stock = random_model(tiny_config(name))
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


def check(stock: torch.nn.Module, llm: LLM) -> None:
    """All prompts at once, and once more in the slots that they leave, one of them aborted before."""
    stream = llm.stream(prompts()[0], GREEDY)
    next(stream)
    stream.close()
    for _ in range(2):
        for prompt, done in zip(prompts(), llm.generate(prompts(), GREEDY)):
            assert done.token_ids == continued(stock, prompt)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "mamba2"])
def test_tokens_are_those_of_transformers(tiny, name: str) -> None:
    stock, config_of = tiny(name)
    preempted = 0
    for cut in CUT.values():
        config = config_of(**cut)
        llm = LLM(config, built=build_model(compiler_options(config), progress=False))
        check(stock, llm)
        preempted += llm.engine.scheduler.counters.preemptions
        assert not llm.engine.scheduler.block_tables.pool.enable_caching
    assert preempted or name == "mamba2"  # whose blocks never run out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "lfm2", "nemotron_h", "jamba", "mamba2"])
def test_compiled_and_stored(tiny, no_other_models: None, name: str) -> None:
    stock, config_of = tiny(name)
    config = config_of(compile=True)
    for stored in (False, True):
        built = build_model(compiler_options(config), progress=False)
        assert built.is_stored == stored
        built.compile()
        check(stock, LLM(config, built=built))


@pytest.mark.parametrize(
    "settings, why",
    [
        (dict(speculative_method="ngram"), "rejected draft token .* leave speculative_method"),
        (dict(deterministic=True, compile=True), "set deterministic to false"),
    ],
)
def test_what_it_is_not_served_with(tiny, settings: dict, why: str) -> None:
    _, config_of = tiny("mamba2")
    with pytest.raises(ValueError, match=why):
        build_model(compiler_options(config_of(**settings)), progress=False)
