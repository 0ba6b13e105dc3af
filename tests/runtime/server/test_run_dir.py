"""The server's private folder: where it may be, that it is removed, and that nobody else's is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pagegraph.runtime.server.run_dir import LOCK, PREFIX, RunDir
from tests.paths import ROOT

KILLED = """
import os, signal
from pagegraph.runtime.server.run_dir import RunDir
kept = RunDir()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("t")  # short, as a socket wants it
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_private_folder_with_private_files(temporary: Path) -> None:
    folder = RunDir()
    assert folder.path.parent == temporary and folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.write("settings", "text").stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder.socket(0)))
    folder.close()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["a" * 100, "\u00e9" * 50, "missing/folder"])
def test_a_temporary_folder_that_holds_no_socket_is_passed_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if "/" not in name:
        (temporary / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / name))
    monkeypatch.setattr("pagegraph.runtime.server.run_dir.FALLBACKS", (str(temporary),))
    folder = RunDir()
    assert folder.path.parent == temporary
    folder.close()
    assert "/" in name or list((temporary / name).iterdir()) == []


def test_what_the_dead_left_is_removed_and_nothing_else(temporary: Path) -> None:
    living = RunDir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", KILLED], env=environment)
    (left,) = set(temporary.iterdir()) - {living.path}
    assert (left / LOCK).exists()
    for name in ("", "x"):  # a folder just made, and one that only looks like ours
        (temporary / f"{PREFIX}{name}").mkdir()
    (temporary / f"{PREFIX}file").touch()
    (temporary / f"{PREFIX}link").symlink_to(living.path)
    folder = RunDir()
    assert not left.exists() and living.socket(0).parent.exists() and (living.path / LOCK).exists()
    assert len(list(temporary.iterdir())) == 6
    folder.close()
    living.close()
