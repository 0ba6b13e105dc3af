"""Folders of models of more than text, as transformers saves them: text is served, and towers are not loaded."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pagegraph.compiler.build import plan_models
from pagegraph.compiler.model.checkpoint import WeightsMismatch
from pagegraph.compiler.model.config_json import load_model_config
from pagegraph.compiler.model.left_out import towers_if_installed
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, PagedModel, wrap_model
from pagegraph.compiler.model.weights import load_weights
from pagegraph.compiler.options import CompilerOptions, KvCacheOptions, ModelOptions, StepOptions
from pagegraph.compiler.resolve import resolve_quantization
from pagegraph.compiler.verify.layers import layers_of
from pagegraph.compiler.verify.reference import stock_model
from tests.compiler.model.coverage import furthest, served
from tests.compiler.model.every_type import tiny
from tests.compiler.model.test_paged import prompts_for, random_model, stock_logits
from tests.compiler.quantization.checkpoints import write

# `test_every_type` has the others.
POPULAR = ("gemma3", "gemma4", "kimi_k25", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl_moe")


def saved(kind: str, folder: Path) -> torch.nn.Module:
    """A tiny random model of the type, saved to `folder` -> the stock model."""
    stock = random_model(tiny(kind), AutoModelForImageTextToText)
    stock.save_pretrained(folder)
    return stock


@torch.inference_mode()
def check_text(stock: torch.nn.Module, paged: PagedModel) -> None:
    """Logits of text are those of the stock model, whole, in chunks and mixed."""
    prompts = prompts_for(128)
    expected = stock_logits(stock, prompts)
    bound = 1e-4 * max(1.0, max(one.abs().max().item() for one in expected) / 5)
    assert furthest(paged, prompts, expected) < bound


@pytest.mark.parametrize("kind", POPULAR)
def test_text_of_a_saved_folder(kind: str, tmp_path: Path) -> None:
    stock = saved(kind, tmp_path)
    paged = served(tmp_path)
    check_text(stock, paged)
    towers = sum(one.numel() for one in stock.parameters()) - sum(one.numel() for one in paged.model.parameters())
    assert towers > 0 and not any("vision" in name or "visual" in name for name in paged.model.state_dict())


def test_the_log_says_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock = saved("llava", tmp_path)
    caplog.set_level(logging.INFO)
    served(tmp_path)
    left = [stock.model.vision_tower, stock.model.multi_modal_projector]
    size = sum(4 * one.numel() for module in left for one in module.parameters())
    assert f"model.vision_tower, model.multi_modal_projector left out ({size:,} bytes of weights)" in caplog.text


def test_a_tensor_that_nothing_takes_is_still_refused(tmp_path: Path) -> None:
    saved("llava", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "language_model.model.layers.0.extra.weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"unexpected weights: language_model\.model\.layers\.0\.extra\.weight"):
        served(tmp_path)


@pytest.mark.parametrize("name", ["awq_g32", "fp8_row"])
@torch.inference_mode()
def test_a_quantised_folder(name: str, tmp_path: Path) -> None:
    """Tensors of towers are left out whatever they are called."""
    stock = write(tmp_path, random_model(tiny("qwen2_5_vl"), AutoModelForImageTextToText), name)
    config = load_model_config(tmp_path)
    scheme = resolve_quantization(None, config, torch.device("cpu"))
    paged = wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256))
    load_weights(
        paged.model, tmp_path, device=torch.device("cpu"), dtype=torch.float32, quantization=scheme, progress=False
    )
    check_text(stock, paged)


def test_the_reference_of_verify_has_no_towers_either(tmp_path: Path) -> None:
    """A tower of as many layers would be taken for the decoder."""
    config = tiny("qwen2_5_vl")
    config.vision_config.depth = config.text_config.num_hidden_layers
    random_model(config, AutoModelForImageTextToText).save_pretrained(tmp_path)
    options = CompilerOptions(
        model=ModelOptions(model=str(tmp_path), dtype="float32"), device=torch.device("cpu"),
        kv_cache=KvCacheOptions(memory=1 << 24), step=StepOptions(max_num_seqs=8, max_decode_tokens=8, max_num_batched_tokens=64),
    )  # fmt: skip
    [planned] = plan_models(options)
    stock = stock_model(options, planned)
    assert stock.model.visual is None
    assert list(layers_of(stock)) == list(layers_of(planned.paged_model.model))


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_tower_whose_package_is_not_installed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny("gemma3n")
    with pytest.raises(ImportError, match="timm"):
        random_model(config, AutoModelForImageTextToText)
    with towers_if_installed(config):
        stock = random_model(config, AutoModelForImageTextToText)
    stock.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tower = {"model.vision_tower.timm_model.conv_stem.conv.weight": torch.ones(2)}
    save_file({**load_file(path), **tower}, path, {"format": "pt"})
    caplog.set_level(logging.INFO)
    check_text(stock, served(tmp_path))
    assert "besides model.vision_tower, whose package is not installed" in caplog.text
