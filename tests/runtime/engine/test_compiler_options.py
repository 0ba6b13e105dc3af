"""A configuration becomes the compiler's options: same names, same defaults, and the device that is there."""

from __future__ import annotations

import pytest
import torch

from pagegraph.compiler.options import KvCacheOptions, ModelOptions, PassOptions
from pagegraph.compiler.passes import registry
from pagegraph.runtime.config import Config, ConfigError
from pagegraph.runtime.engine.compiler_options import compiler_options, model_options, pass_options


def test_defaults_are_those_of_the_configuration() -> None:
    config = Config(model="m", device="cpu")
    assert model_options(config) == ModelOptions(model="m")
    assert pass_options(config) == PassOptions()
    assert compiler_options(config).kv_cache == KvCacheOptions(memory=config.cpu_kv_cache_memory())


def test_every_pass_has_its_switch() -> None:
    settings = {one.setting for one in registry.PASSES if one.setting is not None} | set(registry.GRAPH_PASSES)
    settings |= {name for one in registry.PASSES for name in one.options}
    assert settings == set(PassOptions.__dataclass_fields__)


def test_a_draft_model_is_another_model_on_the_same_device() -> None:
    options = compiler_options(Config(model="m", device="cpu", speculative_model="d", gguf_file="m.gguf"))
    assert options.device == torch.device("cpu")
    assert options.draft == ModelOptions(model="d") and options.model.gguf_file == "m.gguf"
    assert options.step.max_draft_tokens > 0 and options.step.ngram is None


def test_a_token_budget_below_the_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs=4096 exceeds max_num_batched_tokens=2048"):
        compiler_options(Config(model="m", device="cpu", max_num_seqs=4096))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = Config(model="m", device="cuda", tensor_parallel_size=2)
    assert [compiler_options(config, rank=rank).device for rank in range(2)] == [
        torch.device("cuda", rank) for rank in range(2)
    ]
    with pytest.raises(
        ValueError, match="tensor_parallel_size=4 wants a GPU for each rank, and torch sees 2 here; set it to 2 or less"
    ):
        compiler_options(Config(model="m", tensor_parallel_size=4))
    assert compiler_options(Config(model="m", device="cuda")).device == torch.device("cuda")
