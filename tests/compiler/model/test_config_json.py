"""A model's config.json: what is wrong in it is named, and old names of rope types are understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from pagegraph.compiler.model.config_json import load_model_config
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.resolve import resolve_max_model_len
from tests.compiler.architectures import SIZES
from tests.compiler.model.test_rope import LONGROPE

FACTORS = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}


def folder_of(tmp_path: Path, **said: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama") | SIZES | said))
    return tmp_path


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (
            dict(rope_parameters=dict(rope_type="yarn")),
            r"Missing required keys in `rope_parameters` .*'yarn': \{'factor'\}$",
        ),
        (
            dict(rope_scaling=dict(type="linear", factor="4")),
            r"rope_scaling\.factor must be a number above 0, not '4'$",
        ),
        (dict(rope_scaling=dict(type="linear", factor=0)), r"rope_scaling\.factor must be a number above 0, not 0$"),
        (
            dict(rope_scaling=dict(type="yarn", factor=True)),
            r"rope_scaling\.factor must be a number above 0, not True$",
        ),
        (
            dict(rope_parameters=dict(rope_type=3)),
            r"rope_parameters\.rope_type must be the name of a rope type, not 3$",
        ),
        (dict(rope_parameters="yarn"), "Field 'rope_parameters' with value 'yarn'"),
        (
            dict(num_attention_heads=3),
            r"The hidden size \(64\) is not a multiple of the number of attention heads \(3\)\.$",
        ),
        (dict(num_attention_heads=0), "num_attention_heads must be 1 or more, not 0$"),
        (dict(text_config=dict(vocab_size=-1)), r"text_config\.vocab_size must be 1 or more, not -1$"),
        (dict(vocab_size="x"), r"Field 'vocab_size' expected int, got str \(value: 'x'\)$"),
        (dict(dtype="float99"), "AttributeError: .*float99"),
        (dict(model_type="no such"), ".*model type `no such`"),
        (dict(model_type=None), ".*model type `None`"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^\S+config\.json: " + sentence) as raised:
        load_model_config(folder_of(tmp_path, **wrong))
    assert "\n" not in str(raised.value)


def test_packages_and_files_that_lack_keep_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ImportError("pip install it")

    monkeypatch.setattr(AutoConfig, "from_pretrained", lacking)
    with pytest.raises(ImportError, match="^pip install it$"):
        load_model_config(folder_of(tmp_path))


def test_su_is_longrope(tmp_path: Path) -> None:
    """The first files of Phi-3 have its original length beside the rope scaling."""
    said = dict(model_type="phi3", original_max_position_embeddings=64)
    config = load_model_config(folder_of(tmp_path, **said, rope_scaling=dict(type="su", **FACTORS)))
    assert config.name_or_path == str(tmp_path)
    assert resolve_max_model_len(None, config) == 64
    assert config.rope_parameters["rope_type"] == "longrope"
    expected = load_model_config(folder_of(tmp_path, **said, rope_scaling=dict(type="longrope", **FACTORS)))
    for length in (64, 256):
        models = [build_meta(each, torch.float32, "eager", max_model_len=length) for each in (config, expected)]
        one, other = (each.model.rotary_emb for each in models)
        torch.testing.assert_close(one.inv_freq, other.inv_freq)
        assert one.attention_scaling == other.attention_scaling


@pytest.mark.parametrize(
    "rope", [dict(rope_type=None), dict(type=None, rope_theta=1e4), dict(rope_type=None, type="default")]
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_rope_type_of_null_is_the_default(tmp_path: Path, key: str, rope: dict[str, object]) -> None:
    config = load_model_config(folder_of(tmp_path, **{key: rope}))
    assert config.rope_parameters["rope_type"] == "default" and config.rope_parameters["rope_theta"] == 1e4
    build_meta(config, torch.float32, "eager", max_model_len=64)


def test_a_rope_type_of_null_for_a_type_of_layer(tmp_path: Path) -> None:
    rope = dict(
        full_attention=dict(rope_type=None, rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4)
    )
    config = load_model_config(folder_of(tmp_path, model_type="gemma3_text", rope_parameters=rope))
    assert config.rope_parameters["full_attention"]["rope_type"] == "default"
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
