"""Facts that the stages of building a model read off its files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from pagegraph.compiler.quantization.config import Scheme
from pagegraph.compiler.resolve import eos_ids, resolve_dtype, resolve_quantization
from tests.compiler.model.every_type import tiny

WORDS = {
    "model": {"vocab": {"</s>": 5, "hello": 2}},
    "added_tokens": [{"id": 7, "content": "<|im_end|>"}, {"id": 8, "content": "<|eot|>"}],
}


def folder_of(tmp_path: Path, **files: object) -> Path:
    """A model folder of JSON files; `generation_config={...}` is generation_config.json."""
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "files, expected",
    [
        (dict(config=dict(eos_token_id=3), generation_config=dict(eos_token_id=[4, 1])), {1, 3, 4}),
        (dict(config=dict(eos_token_id=3), generation_config=dict(eos_token_id=[])), {3}),
        (
            dict(
                config=dict(eos_token_id=[]),
                generation_config={},
                tokenizer=WORDS,
                tokenizer_config=dict(eos_token="<|im_end|>"),
            ),
            {7},
        ),
        (dict(config=dict(text_config=dict(eos_token_id=9), eos_token_id=None)), {9}),
        (
            dict(config=dict(eos_token_id=3), tokenizer=WORDS, special_tokens_map=dict(eos_token=dict(content="</s>"))),
            {3, 5},
        ),
        (dict(config={}, tokenizer=WORDS, tokenizer_config=dict(eos_token="</s>", eot_token="<|eot|>")), {5, 8}),
        (dict(config={}, tokenizer=WORDS, tokenizer_config=dict(eos_token="no such token")), {2}),
        (dict(config={}), {2}),  # LlamaConfig's own
        (dict(config=dict(eos_token_id=3), generation_config=dict(eos_token_id=[2, 40_000])), {2, 3}),  # of 32,000
        (dict(config=dict(eos_token_id=-1), generation_config=dict(eos_token_id=[True, None, 6])), {6}),
    ],
)
def test_whoever_names_an_end_is_heard(tmp_path: Path, files: dict[str, object], expected: set[int]) -> None:
    assert eos_ids(folder_of(tmp_path, **files), LlamaConfig()) == expected


def test_a_tokenizer_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = folder_of(tmp_path / "other", tokenizer=WORDS, tokenizer_config=dict(eos_token="<|im_end|>"))
    model = folder_of(tmp_path, config=dict(eos_token_id=3), tokenizer=WORDS, tokenizer_config=dict(eos_token="</s>"))
    assert eos_ids(model, LlamaConfig(), other) == {3, 7}


def test_no_end_at_all_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert eos_ids(folder_of(tmp_path, config={}), LlamaConfig(eos_token_id=None)) == frozenset()
    assert "names no end-of-sequence token" in caplog.text


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is no JSON"):
        eos_ids(tmp_path, LlamaConfig())


@pytest.mark.parametrize("of_text", [False, True])
def test_what_a_model_of_more_than_text_says_counts_for_its_text(of_text: bool) -> None:
    """Kimi-K2.5 says in `text_config` how it is quantised."""
    config = tiny("qwen2_5_vl")
    part = config.text_config if of_text else config
    part.dtype = torch.float16
    part.quantization_config = dict(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True)
    assert resolve_dtype("auto", config, torch.device("cuda")) == torch.float16
    assert isinstance(resolve_quantization(None, config, torch.device("cpu")), Scheme)
    assert not any(hasattr(one, "quantization_config") for one in (config, config.text_config))
