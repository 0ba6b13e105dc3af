"""The tables of README.md and perf/README.md say what the stored results say."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from perf import tables
from tests.paths import ROOT

# What the documents quote; of a job that several files hold the last one counts.
QUOTED = [
    ROOT / "perf" / "results" / f"h200-2026-11-24-{name}.json"
    for name in ("llama3-8b", "qwen3-0.6b", "few-rows-vllm", "qwen3-0.6b-served")
]


@pytest.mark.parametrize(
    "document, table",
    [
        ("README.md", tables.overview),
        ("perf/README.md", tables.jobs),
        ("perf/README.md", tables.steps),
        ("perf/README.md", tables.served),
    ],
)
def test_a_table_is_of_the_stored_results(document: str, table: Callable[[tables.Results], Iterator[str]]) -> None:
    expected = list(table(tables.Results(QUOTED)))
    lines = (ROOT / document).read_text().splitlines()
    assert expected[0] in lines, f"{document} has no table of {expected[0]}"
    start = lines.index(expected[0])
    end = next(at for at in range(start, len(lines) + 1) if at == len(lines) or not lines[at].startswith("|"))
    assert lines[start:end] == expected
