"""Every causal-LM type of transformers, tiny and random: right against its own eager forward, or refused, never wrong.

What the generic small sizes of `every_type` do not reach is skipped and says why.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, PagedModel, wrap_model
from pagegraph.compiler.model.probe import UnsupportedModel
from tests.compiler.model.every_type import causal_types, tiny
from tests.compiler.model.test_paged import CHUNKED, MIXED, WHOLE, check_head, prompts_for, random_model, stock_logits
from tests.compiler.paged_run import run_paged

MOST_PARAMETERS = 5_000_000
# Types that are served: a guard that refuses one of them is too strict.
RIGHT = frozenset(
    """
    afmoe apertus arcee axk1 bert bert-generation biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3
    dots1 electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa
    granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 laguna lfm2
    llama llama4_text mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
    modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe
    roc_bert seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
""".split()
)


def build_tiny(kind: str) -> PagedModel:
    """Wrapped on the meta device; skips the test where the small sizes do not make a small model of the type."""
    try:
        config = tiny(kind)
        with torch.device("meta"):
            size = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size} parameters at small sizes")
    except Exception as error:
        assert kind not in RIGHT
        pytest.skip(f"{kind}: {type(error).__name__}: {error}")
    return wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256))


@pytest.mark.slow
@pytest.mark.parametrize("kind", causal_types())
@torch.inference_mode()
def test_right_or_refused(kind: str) -> None:
    try:
        paged = build_tiny(kind)
    except UnsupportedModel as refused:
        assert str(refused).startswith(f"{kind}: ")
        assert kind not in RIGHT
        return
    prompts = prompts_for(128)
    try:
        stock = random_model(tiny(kind))
        expected = stock_logits(stock, prompts)
    except Exception as error:
        assert kind not in RIGHT
        pytest.skip(f"{kind}: transformers' own forward: {type(error).__name__}: {error}")
    paged.model.load_state_dict(stock.state_dict(), assign=True, strict=True)
    paged.model.tie_weights()
    bound = 1e-4 * max(1.0, max(one.abs().max().item() for one in expected) / 5)
    for schedule in (WHOLE, CHUNKED, MIXED):
        for sequence, by_position in enumerate(run_paged(paged, paged.layouts, prompts, schedule)):
            for position, logits in by_position.items():
                torch.testing.assert_close(logits, expected[sequence][position], atol=bound, rtol=0)
    check_head(paged, prompts, expected, bound)
