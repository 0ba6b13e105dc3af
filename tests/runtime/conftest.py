"""The real model, built and compiled once for every test that generates with it, and a tiny one to plan or build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.runtime.config import Config, load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from tests.compiler.architectures import tiny_config

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Config]:
    """A function from overrides to a float32 configuration of the real model."""

    def make(**overrides: object) -> Config:
        settings = dict(dtype="float32", device="cpu", max_model_len=1024, kv_cache_memory="256MiB", max_num_seqs=16)
        return load_config(MODEL, {**settings, **overrides}).config

    return make


@pytest.fixture(scope="session")
def real_model(config_of) -> BuiltModel:
    return build_compiled(compiler_options(config_of()), progress=False)


@pytest.fixture(scope="session")
def built(real_model: BuiltModel) -> BuiltModel:
    """The same, to which a module may do what its tests want."""
    return real_model


@pytest.fixture(scope="session")
def model(real_model: BuiltModel) -> torch.nn.Module:
    """transformers' own."""
    folder = real_model.folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture
def llm(config_of, built) -> LLM:
    """An engine of its own, with nothing cached, over the shared model."""
    return LLM(config_of(), built=built)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """The configuration of a tiny model, without weights."""
    tiny_config("qwen3").save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def no_other_models() -> None:
    """Dynamo counts the forwards of all models of a process, and stops at eight."""
    torch._dynamo.reset()
