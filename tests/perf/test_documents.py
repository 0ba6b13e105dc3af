"""README.md and perf/README.md show no figure that is not in the stored results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from perf import tables
from tests.paths import ROOT

# A number with a unit of speed, a ratio ("1.5 x", "3x", "12 times") or a share.
MEASURED = re.compile(
    r"\d[\d.,]*\s?(%|ms\b|us\b|s\b|tok/s|tokens/s|TB/s|GB/s|TFLOP/s|x\b(?! \d)|times\b)|\bKL \d|\b\d+\.\d+ to \d+\.\d+\b"
)


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_of_the_stored_results(document: Path) -> None:
    text = document.read_text()
    assert tables.PLACE.search(text), "no table"
    assert text == tables.filled(text), "run python -m perf.tables --write"


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_measured_figure_stands_outside_a_table(document: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", tables.PLACE.sub("", document.read_text()), flags=re.S)
    found = [line for line in prose.splitlines() if MEASURED.search(line)]
    assert not found, "\n".join(found)


def test_what_counts_as_a_measured_figure() -> None:
    for text in (
        "1.49 x vLLM",
        "takes 139 s",
        "up to 96.6%",
        "0.28 ms",
        "78,362 tok/s",
        "KL 0.066",
        "3x",
        "0.8 to 0.9",
    ):
        assert MEASURED.search(text), text
    for text in ("a 128 x 128 block", "98 MB", "Qwen3-0.6B", "torch 2.11", "groups of 128", "256 sequences"):
        assert not MEASURED.search(text), text


def test_every_table_has_a_place_and_every_result_a_mention() -> None:
    texts = [document.read_text() for document in tables.DOCUMENTS]
    places = [place["name"] for text in texts for place in tables.PLACE.finditer(text)]
    assert sorted(places) == sorted(tables.TABLES)
    log = (ROOT / "perf" / "LOG.md").read_text()
    named = set(re.findall(r"\b(?:cpu|h200)-[\w.-]+\.(?:json|txt)\b", log))
    stored = {path.name for path in tables.RESULTS.iterdir()}
    assert named <= stored, named - stored
    source = Path(tables.__file__).read_text()
    assert not [name for name in stored - named if name.rsplit(".", 1)[0].removeprefix("h200-") not in source]
