"""Is a prompt of 100,000 tokens answered right: rope of `llama3` scaled to 128k, against transformers on the same device.

A model of two layers whose random weights make attention sharp, so that a wrong position or a lost block would show: the
section says how far plain rope is off, too. Computed in float32 and in bfloat16, in chunks and out of the prefix cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from pagegraph.compiler.build import build_compiled
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf.floors import MODELS
from perf.gpu.offline import Offline, config_of, random_prompts
from perf.gpu.report import Report

PROMPT, TINY_PROMPT, TOKENS = 100_000, 3000, 16
PART = 2000  # tokens of a prompt that transformers is given at a time
ROPE = MODELS["8b-128k"]["rope_scaling"]
FLOAT32_ERROR = 2e-3  # of a log-probability, at the most
MARGIN = 1.5  # in bfloat16 the engine may be so many times as far from float32 as transformers is


def long_context(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Errors of the log-probabilities of sampled tokens, each type: chunked, and with the prompt's blocks in the cache."""
    folder = Path(tempfile.mkdtemp(prefix="pagegraph-long-"))
    length = TINY_PROMPT if args.tiny else PROMPT
    _write(folder, original=512 if args.tiny else ROPE["original_max_position_embeddings"])
    (prompt,) = random_prompts(0, [length], 1000)
    for dtype in ("float32", "bfloat16"):
        settings = dict(model=str(folder), load_format="auto", dtype=dtype, max_num_seqs=8, max_model_len=131072,
                        enable_prefix_caching=True, kv_cache_memory=2 << 30)  # fmt: skip
        config = dataclasses.replace(config_of(args, "tiny"), **settings)
        built = build_compiled(compiler_options(config), progress=False)
        offline = Offline(config, built)
        chunked, cached = (offline.run([prompt], [TOKENS], logprobs=2) for _ in range(2))
        built.step.close()
        ids = chunked.outputs[0]
        exact = _transformers(folder, prompt + ids, args.device, "float32")
        mine, again = (np.array([token.logprob for token in run.logprobs[0]]) for run in (chunked, cached))
        theirs = _transformers(folder, prompt + ids, args.device, dtype)
        plain = _transformers(folder, prompt + ids, args.device, "float32", plain_rope=True)
        error, error_theirs, error_plain = (float(np.abs(found - exact).max()) for found in (mine, theirs, plain))
        report.row(
            dtype=dtype, prompt=length, steps=len(chunked.steps), in_graphs=chunked.graph_hits, error=error, transformers=error_theirs,
            plain_rope=error_plain, steps_cached=len(cached.steps), same_tokens=cached.outputs == chunked.outputs,
        )  # fmt: skip
        allowed = FLOAT32_ERROR if dtype == "float32" else MARGIN * error_theirs
        if not error <= allowed:
            report.failure(f"{dtype}: {error:.2e} off, {allowed:.2e} allowed")
        if not error_plain > 10 * allowed:
            report.failure(f"{dtype}: plain rope is {error_plain:.2e} off: the model does not tell")
        if dtype == "float32" and (cached.outputs != chunked.outputs or np.abs(again - mine).max() > FLOAT32_ERROR):
            report.failure("the prompt out of the prefix cache is answered otherwise")
        if len(cached.steps) != TOKENS:
            report.failure(f"the cached prompt took {len(cached.steps)} steps for {TOKENS} tokens")


def _write(folder: Path, original: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=128, intermediate_size=1024,
        vocab_size=1000, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling={**ROPE, "original_max_position_embeddings": original}, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            sharp = "q_proj" in name or "k_proj" in name
            torch.nn.init.normal_(weight, std=0.083 if sharp else 1.0 if "embed" in name else 0.06)
    model.save_pretrained(folder)


@torch.inference_mode()
def _transformers(folder: Path, ids: list[int], device: str, dtype: str, *, plain_rope: bool = False) -> np.ndarray:
    """Log-probabilities of the last TOKENS ids, each behind those before it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if plain_rope:
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model, given, cache = model.eval().to(device), torch.tensor([ids], device=device), None
    before, last = given[:, : -TOKENS - 1], given[:, -TOKENS - 1 :]
    for part in (*before.split(PART, dim=1), last):  # attention in float32 may hold the scores of all pairs of tokens
        found = model(part, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
    out = found.logits[0, :-1].float()
    return out.log_softmax(-1).gather(1, given[0, -TOKENS:, None])[:, 0].cpu().numpy()
