"""What the passes found, and the reasons for what they left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagegraph.compiler import build
from pagegraph.compiler.explain.fusions import PassResult, run_passes
from pagegraph.compiler.explain.ledger import planned_states
from pagegraph.compiler.explain.trace import trace
from pagegraph.compiler.options import CompilerOptions, KvCacheOptions, ModelOptions, StepOptions
from pagegraph.compiler.passes.registry import graph_passes
from pagegraph.compiler.step.dummy import dummy_step
from tests.compiler.architectures import tiny_config


def passes_of(architecture: str, folder: Path, device: str) -> dict[str, PassResult]:
    tiny_config(architecture).save_pretrained(folder)
    options = CompilerOptions(
        model=ModelOptions(model=str(folder), load_format="dummy", dtype="bfloat16"), device=torch.device(device),
        capability=(9, 0), kv_cache=KvCacheOptions(memory=1 << 24),
        step=StepOptions(max_num_seqs=8, max_decode_tokens=8, max_num_batched_tokens=64),
    )  # fmt: skip
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    traced = trace(model.paged_model, state, [dummy_step([1] if device == "cpu" else [5, 1, 3], 0)])
    return {one.name: one for one in run_passes(traced.graphs[0], graph_passes(options.passes, options.device))}


def test_a_llama_is_fused_whole(tmp_path: Path) -> None:
    found = passes_of("qwen3", tmp_path, "cuda")
    assert (found["fuse_rope"].hits, found["fuse_rope"].missed) == (4, {})
    assert found["fuse_rows"].hits == 13 and not found["fuse_rows"].missed
    assert found["fuse_linears"].hits == 7
    [(reason, count)] = found["fuse_linears"].missed.items()
    assert count == 3 and "head" in reason


@pytest.mark.parametrize(
    "architecture, reasons",
    [
        ("gpt2", {"fuse_rope": "not rotated in the half-split form", "fuse_rows": "layer norms"}),
        ("gemma2", {"fuse_rows": "a weight with one added"}),
    ],
)
def test_what_is_left_has_a_reason(architecture: str, reasons: dict[str, str], tmp_path: Path) -> None:
    found = passes_of(architecture, tmp_path, "cuda")
    for name, words in reasons.items():
        assert any(words in reason for reason in found[name].missed), found[name]


def test_one_row_on_a_cpu(tmp_path: Path) -> None:
    assert passes_of("llama", tmp_path, "cpu")["one_row_linears"].hits == 17
