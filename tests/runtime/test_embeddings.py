"""Embeddings of tiny random models through the whole engine: transformers' own, whatever runs beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pagegraph.compiler.model.checkpoint import WeightsMismatch
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, wrap_model
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.runtime.config import Config
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import PoolingParams, SamplingParams
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import prompts_for, random_model


def pooled(stock: torch.nn.Module, ids: list[int], pooling: str) -> np.ndarray:
    """Of the hidden states that transformers gives, the last of which are those behind the final norm."""
    with torch.inference_mode():
        hidden = stock(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[-1][0]
    vector = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pooling]
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize(("name", "pooling"), [("gemma2", "mean"), ("gpt2", "last"), ("qwen3_moe", "cls")])
def test_in_chunks_beside_requests_that_generate(
    tmp_path: Path, tokenizer_folder: Path, name: str, pooling: str
) -> None:
    stock = random_model(tiny_config(name))
    shutil.copytree(tokenizer_folder, folder := tmp_path / "model")
    stock.save_pretrained(folder)
    llm = LLM(
        Config(
            model=str(folder), dtype="float32", device="cpu", compile=False, num_blocks=40, max_num_seqs=4, pooling=pooling,
            max_num_batched_tokens=16, block_size=8, max_model_len=128,
        ), progress=False,
    )  # fmt: skip
    prompts = prompts_for(128)
    embeds, writes = (
        SamplingParams(pooling=PoolingParams()),
        SamplingParams(max_tokens=8, temperature=0, ignore_eos=True),
    )
    alone = [one.token_ids for one in llm.generate(prompts, writes)]
    mixed = llm.generate([*prompts, *prompts], [embeds] * 3 + [writes] * 3)
    assert [one.token_ids for one in mixed] == [[]] * 3 + alone
    assert [one.finish_reason for one in mixed] == ["stop"] * 3 + ["length"] * 3
    for ids, vector in zip(prompts, llm.embed(prompts), strict=True):
        np.testing.assert_allclose(vector, pooled(stock, ids, pooling), atol=1e-4)
    llm.close()


@pytest.mark.parametrize(
    ("name", "sizes"), [("llama", {"is_causal": False}), ("gemma3", {"use_bidirectional_attention": True})]
)
def test_models_that_look_ahead_are_refused(name: str, sizes: dict[str, bool]) -> None:
    """They would be embedded as if each token saw none behind it."""
    config = tiny_config(name).get_text_config()
    for key, value in sizes.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModel):
        wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=64))


def test_a_checkpoint_without_head_gives_embeddings_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Saved by its body's class, under names that lack the body's own."""
    stock = random_model(tiny_config("llama"))
    shutil.copytree(tokenizer_folder, folder := tmp_path / "model")
    stock.model.save_pretrained(folder)
    config = Config(model=str(folder), dtype="float32", device="cpu", compile=False, num_blocks=40, max_model_len=128)
    llm = LLM(config, progress=False)
    prompts = prompts_for(128)
    for ids, vector in zip(prompts, llm.embed(prompts), strict=True):
        np.testing.assert_allclose(vector, pooled(stock, ids, "last"), atol=1e-4)
    for params in (SamplingParams(max_tokens=2), SamplingParams(max_tokens=0, prompt_logprobs=1)):
        with pytest.raises(ValueError, match="model has no output head, only embeddings: post to /v1/embeddings"):
            llm.generate(prompts[:1], params)
    llm.close()


def test_a_head_that_is_missing_is_no_checkpoint_without_head(tmp_path: Path, tokenizer_folder: Path) -> None:
    """config.json says that there is one."""
    stock = random_model(tiny_config("llama"))
    shutil.copytree(tokenizer_folder, folder := tmp_path / "model")
    stock.model.save_pretrained(folder)
    stock.config.architectures = ["LlamaForCausalLM"]
    stock.config.save_pretrained(folder)
    config = Config(model=str(folder), dtype="float32", device="cpu", compile=False, num_blocks=40, max_model_len=128)
    with pytest.raises(WeightsMismatch, match="lm_head"):
        LLM(config, progress=False)
