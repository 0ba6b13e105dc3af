"""The figures of a comparison, and the real model in every mode that quantises while loading."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pagegraph.compiler.build import BuiltModel, build_model
from pagegraph.compiler.verify.steps import prompt_logits
from pagegraph.runtime.config import load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM
from perf.quality import compare, summarize
from tests.compiler.quantization.checkpoints import write
from tests.prompts import PROMPTS

GGUF = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")
real = pytest.mark.skipif(not GGUF.is_file(), reason=f"{GGUF.name} is not in models/")


def test_equal_models_do_not_differ() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    quality = summarize([(logits, logits + 3.0, [1, 2, 3, 4, 5])])  # a constant changes no probability
    assert quality.positions == 5 and quality.top1_agreement == 1.0
    assert quality.kl == pytest.approx(0, abs=1e-6) and quality.logprob_error == pytest.approx(0, abs=1e-6)
    assert quality.perplexity == pytest.approx(quality.original_perplexity)


def test_figures_of_two_known_distributions() -> None:
    """Original (1/2, 1/2) and other (3/4, 1/4) at both positions; the prompt's second token is 1."""
    original = torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log()
    other = torch.tensor([[0.75, 0.25], [0.4, 0.6]]).log()
    quality = summarize([(original, other, [0, 1])])
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = 0.6 * math.log(0.6 / 0.4) + 0.4 * math.log(0.4 / 0.6)
    assert quality.kl == pytest.approx((first + second) / 2, rel=1e-5)
    assert quality.top1_agreement == 0.5
    assert quality.logprob_error == pytest.approx(math.log(2), rel=1e-5)
    assert (quality.original_perplexity, quality.perplexity) == pytest.approx((2, 4), rel=1e-5)


def built(model: str | Path, quantization: str | None = None, kv_cache_dtype: str = "auto") -> BuiltModel:
    settings = dict(dtype="bfloat16", device="cpu", max_model_len=256, kv_cache_memory="64MiB", max_num_seqs=4)
    chosen = dict(quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    return build_model(compiler_options(load_config(str(model), {**settings, **chosen}).config), progress=False)


def prompts_of(llm: LLM) -> list[list[int]]:
    ids = llm.tokenizer.encode(" ".join(PROMPTS))
    return [ids[at : at + 64] for at in range(0, len(ids) - 1, 64)]


@pytest.mark.slow
@real
@pytest.mark.parametrize(
    "method, agreement, kl", [("int8", 0.87, 0.03), ("int4", 0.87, 0.03), ("fp8", 0.85, 0.06), ("gguf", 0.92, 0.01)]
)
def test_the_real_model_quantised(method: str, agreement: float, kl: float) -> None:
    original, other = built(GGUF), built(GGUF, method)
    llm = LLM(load_config(str(GGUF), dict(device="cpu", max_model_len=256)).config, built=other)
    quality = compare(original, other, prompts_of(llm))
    (answer,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=4, temperature=0.0))
    print(f"\n{method}: {quality}; {answer.text!r}")
    assert quality.top1_agreement > agreement and quality.kl < kl
    assert "Paris" in answer.text


@pytest.mark.slow
@real
def test_the_real_model_with_an_8_bit_kv_cache() -> None:
    """Twice the blocks in the same bytes; probabilities as close as with weights of 8 bits."""
    original, other = built(GGUF), built(GGUF, kv_cache_dtype="fp8")
    assert other.num_blocks == 2 * original.num_blocks
    llm = LLM(load_config(str(GGUF), dict(device="cpu", max_model_len=256)).config, built=other)
    quality = compare(original, other, prompts_of(llm))
    print(f"\nfp8 cache: {quality}")
    assert quality.top1_agreement > 0.88 and quality.kl < 0.03


@pytest.mark.slow
@real
@pytest.mark.parametrize("name", ["awq_g64", "gptq_4_act_order", "gptq_8", "w8a8", "fp8_row", "fp8_block"])
def test_the_real_model_from_quantised_checkpoints(name: str, tmp_path: Path) -> None:
    """Written in the format by plain rounding; what is served agrees with the values that the format holds."""
    from transformers import AutoModelForCausalLM

    original, of_8_bits = built(GGUF), name in ("gptq_8", "w8a8", "fp8_row", "fp8_block")
    held = write(tmp_path, AutoModelForCausalLM.from_pretrained(original.folder, dtype=torch.float32), name)
    for file in [
        *original.folder.glob("token*"),
        *original.folder.glob("*.jinja"),
        original.folder / "generation_config.json",
    ]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = built(tmp_path)
    llm = LLM(load_config(str(tmp_path), dict(device="cpu", max_model_len=256)).config, built=other)
    prompts = prompts_of(llm)
    quality = compare(original, other, prompts)
    with torch.inference_mode():
        own = summarize(
            [(held(torch.tensor([ids])).logits[0].float(), prompt_logits(other, ids), ids) for ids in prompts]
        )
    (answer,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=4, temperature=0.0))
    print(f"\n{name}: {quality}; against its own values: {own}; {answer.text!r}")
    assert own.kl < 0.01 and own.top1_agreement > 0.93
    assert "Paris" in answer.text
    assert quality.kl < (0.06 if of_8_bits else 0.6)
