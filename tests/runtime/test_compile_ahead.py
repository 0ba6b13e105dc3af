"""The compiling process: its failure is told, and a filled cache needs none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from runtime import compile_ahead
from runtime.config import Config


def config_of(folder: Path, **changed: object) -> Config:
    return Config(**{"model": str(folder / "nothing"), "compile_cache_dir": str(folder / "cache"), "device": "cpu", **changed})


def test_a_failure_is_told_with_its_reason_and_leaves_no_stamp(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"config": dataclasses.asdict(config)}))
    (tmp_path / "cache" / "inductor").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nothing"):
            compile_ahead.fill_cache(config, settings)


def test_a_filled_cache_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    stamp = compile_ahead._stamp(config)
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    monkeypatch.setattr(compile_ahead.subprocess, "Popen", None)
    compile_ahead.fill_cache(config, tmp_path / "settings.json")


def test_the_stamp_depends_on_the_configuration(tmp_path: Path) -> None:
    assert compile_ahead._stamp(config_of(tmp_path)) != compile_ahead._stamp(config_of(tmp_path, max_num_seqs=7))
    assert compile_ahead._stamp(config_of(tmp_path)) == compile_ahead._stamp(config_of(tmp_path))
