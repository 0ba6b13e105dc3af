"""What a model's folder says of embeddings, and which dimensions they may have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagegraph.runtime.bad_parameter import BadParameter
from pagegraph.runtime.pooling import Pooler, pooler_of

FLAGS = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens", "pooling_mode_lasttoken")


def folder_of(
    path: Path, pooling: dict | None = None, modules: str = "Transformer Pooling Normalize", **config
) -> Path:
    """As sentence-transformers saves a model."""
    rows = [
        {
            "idx": at,
            "name": str(at),
            "path": f"{at}_{name}" if at else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for at, name in enumerate(modules.split())
    ]
    (path / "config.json").write_text(json.dumps(config))
    (path / "modules.json").write_text(json.dumps(rows))
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({name: name == "pooling_mode_lasttoken" for name in FLAGS}, "last"),
        ({name: name == "pooling_mode_mean_tokens" for name in FLAGS}, "mean"),
        ({name: name == "pooling_mode_cls_token" for name in FLAGS}, "cls"),
        ({"pooling_mode": "mean", "embedding_dimension": 8}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_pooling_is_read_off_the_folder(tmp_path: Path, pooling: dict, wanted: str) -> None:
    folder = folder_of(tmp_path, pooling)
    assert pooler_of(folder, 8) == Pooler(8, wanted, normalize=True)
    assert pooler_of(folder, 8, "cls") == Pooler(8, "cls", normalize=True)


def test_without_files_it_is_the_last_token_of_length_1(tmp_path: Path) -> None:
    assert pooler_of(tmp_path, 8) == Pooler(8, "last", normalize=True)
    assert pooler_of(tmp_path, 8, "mean") == Pooler(8, "mean", normalize=True)


def test_what_is_not_there_is_not_done(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"pooling_mode": "mean"}, "Transformer Pooling")
    assert pooler_of(folder, 8) == Pooler(8, "mean", normalize=False)


@pytest.mark.parametrize(
    ("pooling", "why"),
    [
        ({"pooling_mode_max_tokens": True}, "it pools by pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "it pools by cls and mean"),
        ({"pooling_mode": "weightedmean"}, "it pools by weightedmean"),
        ({}, "it pools by nothing"),
    ],
)
def test_other_pooling_is_refused_unless_it_is_set(tmp_path: Path, pooling: dict, why: str) -> None:
    folder = folder_of(tmp_path, pooling)
    with pytest.raises(BadParameter, match=f"{why}.*set pooling to last, mean or cls"):
        pooler_of(folder, 8).check(None)
    pooler_of(folder, 8, "mean").check(None)


def test_a_module_that_would_change_the_vector_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"pooling_mode": "mean"}, "Transformer Pooling Dense Normalize")
    for pooling in ("auto", "mean"):
        found = pooler_of(folder, 8, pooling)
        assert found.size == 8  # prompts can be read all the same
        with pytest.raises(BadParameter, match="has a Dense module"):
            found.check(None)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"path": "x"}]', "3"])
def test_a_broken_file_names_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ValueError, match="modules.json is no list of modules"):
        pooler_of(tmp_path, 8)


def test_dimensions(tmp_path: Path) -> None:
    plain, any_of, some = (
        pooler_of(folder_of(path, {"pooling_mode": "mean"}, **config), 8)
        for name, config in (
            ("plain", {}), ("any", {"is_matryoshka": True}), ("some", {"matryoshka_dimensions": [2, 4]}),
        )
        if (path := tmp_path / name).mkdir() is None
    )  # fmt: skip
    for pooler in (plain, any_of, some):
        pooler.check(None)
        pooler.check(8)
        for wrong in (0, -1, 9, 10**9):
            with pytest.raises(BadParameter, match="have 8, give at most that"):
                pooler.check(wrong)
    any_of.check(3)
    some.check(4)
    with pytest.raises(BadParameter, match="give 2 or 4 or 8"):
        some.check(3)
    with pytest.raises(BadParameter, match="give 8: the model's config.json names no others"):
        plain.check(4)


def test_a_model_without_hidden_states_has_none(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="gives no hidden states"):
        pooler_of(tmp_path, 0).check(None)
