"""Rows of formats: their words can be told apart, and the documents show them as they are."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pagegraph.runtime.text import harmony
from pagegraph.runtime.text.call_writer import write_calls
from pagegraph.runtime.text.formats import CALLS, REASONING, CallFormat, ChatFormat
from tests.paths import ROOT


def calls_table() -> str:
    rows = ["| name | models | a call |", "|---|---|---|"]
    for row in CALLS.values():
        shown = write_calls(row, [("weather", {"city": "Paris"})]).replace("|", "\\|").replace("\n", "⏎")
        fence = ("`` ", " ``") if "`" in shown else "``"
        rows.append(f"| `{row.name}` | {row.models} | {fence[0]}{shown}{fence[1]} |")
    return "\n".join(rows)


def reasoning_table() -> str:
    rows = ["| name | models | reasoning |", "|---|---|---|"]
    for row in REASONING.values():
        words = (harmony.ANALYSIS, "<|end|>") if row.name == "openai" else (row.begin, row.end)
        shown = f"{words[0]} ... {words[1]}".replace("|", "\\|")
        more = "; an answer without either is inside it" if row.assumed else ""
        rows.append(f"| `{row.name}` | {row.models} | `{shown}`{more} |")
    return "\n".join(rows)


@pytest.mark.parametrize(("name", "table"), [("calls", calls_table()), ("reasoning", reasoning_table())])
def test_the_document_shows_the_rows(name: str, table: str) -> None:
    text = (ROOT / "docs" / "tools.md").read_text()
    found = re.search(rf"<!-- table: {name} -->\n(.*?)\n?<!-- end of table -->", text, re.DOTALL)
    assert found and found[1] == table


@pytest.mark.parametrize("row", CALLS.values(), ids=lambda row: row.name)
def test_no_word_that_is_looked_for_begins_another(row: CallFormat) -> None:
    words: set[Any] = {*ChatFormat(calls=row).words(True)}
    first = {found[0].strip() for found in (row.section_begin, row.begin) if found}
    assert not [(one, other) for one in first for other in words if other != one and other.startswith(one)]


def test_signs_of_a_row_are_not_those_of_one_before_it() -> None:
    for rows in (list(CALLS.values()), list(REASONING.values())):
        for at, row in enumerate(rows):
            assert not [before.name for before in rows[:at] if set(before.signs) <= set(row.signs)]
