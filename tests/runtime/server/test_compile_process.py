"""The compiling process: its failure is told, it says that it goes on, and a filled cache needs none."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagegraph.runtime.config import Config
from pagegraph.runtime.server import compile_process
from pagegraph.runtime.server.engine_settings import EngineSettings

EMPTY, FILLED = SimpleNamespace(is_stored=False), SimpleNamespace(is_stored=True)


def test_a_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    config = Config(model=str(tmp_path / "nothing"), compile_cache_dir=str(tmp_path / "cache"), device="cpu")
    settings = tmp_path / "settings.json"
    told = EngineSettings(
        config=config,
        engine_address="ipc:///nowhere",
        drain_flag=tmp_path / "draining",
        pulse=tmp_path / "pulse",
    )
    settings.write_text(told.to_json())
    with pytest.raises(RuntimeError, match="nothing"):
        compile_process.fill_cache(EMPTY, settings)


def test_a_filled_cache_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_process.subprocess, "Popen", None)
    compile_process.fill_cache(FILLED, tmp_path / "settings.json")


def test_a_long_compilation_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compile_process, "REPORT_S", 0.05)
    monkeypatch.setattr(
        compile_process,
        "module_command",
        lambda *_: [sys.executable, "-c", "import time; time.sleep(0.5); print('x' * 100_000)"],
    )
    with caplog.at_level(logging.INFO):
        compile_process.fill_cache(EMPTY, tmp_path / "settings.json")
    assert len([line for line in caplog.messages if "still compiling" in line]) >= 2
