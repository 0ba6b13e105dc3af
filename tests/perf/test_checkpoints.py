"""Checkpoints that sections load: files and names as they are published, which the loader takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pagegraph.compiler.build import build_model
from pagegraph.compiler.quantization.linear import QuantExperts
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf import floors
from perf.gpu import checkpoints, offline

SMALL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=64,
    moe_intermediate_size=64, num_experts_per_tok=2, vocab_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
OWN = {
    "30b-a3b": dict(num_experts=4),
    "gpt-oss-20b": dict(num_local_experts=4, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.mark.parametrize("model", OWN)
def test_the_loader_takes_them(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files; the mixture's experts come together, those of GPT-OSS stay as they are stored."""
    monkeypatch.setitem(floors.MODELS, model, {**floors.MODELS[model], **SMALL, **OWN[model]})
    monkeypatch.setattr(checkpoints, "MEMORY", tmp_path)
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 20_000)
    given = dict(checkpoint=True, device="cpu", quantization=None, no_compile=True, tiny=True)
    args = argparse.Namespace(**given)
    config = offline.config_of(args, model)
    assert len(list(Path(config.model).glob("*.safetensors"))) > 2
    written = [one.stat().st_mtime_ns for one in sorted(Path(config.model).iterdir())]
    assert offline.config_of(args, model) == config
    assert [one.stat().st_mtime_ns for one in sorted(Path(config.model).iterdir())] == written
    built = build_model(compiler_options(config), progress=False)
    packed = [one for one in built.step.paged_model.modules() if isinstance(one, QuantExperts)]
    assert len(packed) == (4 if model == "gpt-oss-20b" else 0)
    assert offline.method_of(args, model) == ("mxfp4" if packed else None)
