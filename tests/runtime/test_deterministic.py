"""deterministic: tokens and log-probabilities are equal bit by bit, whatever runs beside a request and however it is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagegraph.compiler.build import build_compiled, build_model
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.runtime.config import Config, ConfigError, load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import random_model
from tests.runtime.situations import ALL_AT_ONCE, BLOCK_SIZE, MAX_MODEL_LEN, SITUATIONS, Comparer, draw_requests

pytestmark = pytest.mark.timeout(900)

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL = 10_000  # tokens
WINDOWS = dict(
    head_dim=24, hidden_size=72, query_pre_attn_scalar=20, num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
# Sizes that are no multiples of a vector's; windows; weights of 8 and 4 bits.
SIZES: dict[str, tuple[str, dict, dict]] = {
    "llama": ("llama", dict(intermediate_size=88, num_hidden_layers=1), dict(dtype="bfloat16")),
    "qwen3": ("qwen3", dict(head_dim=24, num_hidden_layers=1), dict(dtype="float32")),
    "gemma3": ("gemma3", WINDOWS, dict(dtype="bfloat16", kv_cache_dtype="fp8")),
    "int8": ("llama", dict(num_hidden_layers=1), dict(dtype="bfloat16", quantization="int8")),
    "int4": ("llama", dict(hidden_size=128, num_hidden_layers=1), dict(dtype="bfloat16", quantization="int4")),
}  # fmt: skip


@pytest.fixture
def comparer_of(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Comparer]:
    """A function from a tiny model's name and settings to what compares over it."""

    def make(name: str, **overrides: object) -> Comparer:
        kind, sizes, given = SIZES[name]
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(tokenizer_folder, folder)
            random_model(tiny_config(kind, **sizes)).save_pretrained(folder)

        def config_of(**more: object) -> Config:
            fixed = dict(device="cpu", num_blocks=120, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
            return load_config(str(folder), {**fixed, "deterministic": True, **given, **overrides, **more}).config

        built = build_compiled(compiler_options(config_of(max_num_seqs=8, max_num_batched_tokens=512)), progress=False)
        return Comparer(built, config_of)

    return make


@pytest.mark.hypothesis
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "int4" else ()) for name in SIZES]
)
def test_tiny_models(comparer_of: Callable[..., Comparer], name: str) -> None:
    comparer = comparer_of(name)

    @settings(max_examples=3)
    @given(SITUATIONS, st.integers(0, 1000))
    @example(ALL_AT_ONCE, 0)
    def compare(situation, seed) -> None:
        comparer.compare(draw_requests(seed, 6, 128), situation)
        assert comparer.different == 0

    compare()
    assert comparer.compared > 100 and comparer.preempted and comparer.cached and comparer.drafted


def test_without_it_they_are_not_equal(comparer_of: Callable[..., Comparer]) -> None:
    """What is compared can differ."""
    comparer = comparer_of("qwen3", deterministic=False, compile=False)

    comparer.compare(draw_requests(0, 6, 128), ALL_AT_ONCE)
    assert comparer.different


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.hypothesis
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_real_model(dtype: str) -> None:
    def config_of(**more: object) -> Config:
        fixed = dict(
            device="cpu",
            dtype=dtype,
            deterministic=True,
            num_blocks=200,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
        )
        return load_config(MODEL, {**fixed, **more}).config

    built = build_compiled(compiler_options(config_of(max_num_seqs=8, max_num_batched_tokens=512)), progress=False)
    comparer = Comparer(built, config_of)

    @settings(max_examples=10)
    @given(SITUATIONS, st.integers(0, 10_000))
    @example(ALL_AT_ONCE, 0)
    def compare(situation, seed) -> None:
        comparer.compare(draw_requests(seed, 12, 40_000), situation)
        assert comparer.different == 0

    while comparer.compared < REAL // 2:
        compare()
    print(f"{dtype}: {comparer.compared} tokens with their log-probabilities are equal")
    assert comparer.preempted and comparer.cached and comparer.accepted


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="deterministic=true needs the compiled model, and compile=false; set compile to true"
    ):
        load_config("org/model", dict(deterministic=True, compile=False))
    random_model(tiny_config("mixtral", num_hidden_layers=1)).save_pretrained(tmp_path)
    options = dict(deterministic=True, device="cpu", num_blocks=20)
    with pytest.raises(UnsupportedModel, match="deterministic=true: .*gate .*multiplies weights in a way of its own"):
        build_model(compiler_options(load_config(str(tmp_path), options).config), progress=False)
    random_model(tiny_config("llama", num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="deterministic=true computes bfloat16 and float32 on a CPU, not float16"):
        build_model(
            compiler_options(load_config(str(tmp_path), {**options, "dtype": "float16"}).config), progress=False
        )
