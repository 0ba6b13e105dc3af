"""What a bench shows while it runs: a bar on a terminal, which is gone at its end, and nothing elsewhere."""

from __future__ import annotations

import io

import pytest

from pagegraph.runtime.bench import report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, wanted: bool = True) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with report.progress(3, "requests", wanted) as tick:
        for _ in range(3):
            tick()
    return stream.getvalue()


def test_a_bar_on_a_terminal_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal())
    assert "requests:" in text and "0/3" in text
    assert text.rsplit("\r", 2)[1].strip() == "" and text.endswith("\r")


def test_there_is_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == ""
    assert shown(monkeypatch, Terminal(), wanted=False) == ""
