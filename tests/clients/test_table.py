"""docs/clients.md shows what was stored when the clients were run, of every client there is."""

from __future__ import annotations

import re

from tests.clients import table
from tests.clients.clients import FOLDER, all_clients


def test_the_table_is_of_the_stored_results() -> None:
    text = table.DOCUMENT.read_text()
    assert table.PLACE.search(text), "no table"
    assert text == table.filled(text, table.stored()), "run python -m tests.clients.table --write"


def test_every_client_was_run_with_the_version_that_is_pinned() -> None:
    stored = table.stored()
    assert list(stored) == [client.name for client in all_clients()]
    pinned = set()
    for path in (FOLDER / "requirements").glob("*.in"):
        pinned |= set(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==(\S+)", path.read_text(), re.M))
    pinned |= set(re.findall(r'"([@\w/-]+)": "(\d[\d.]*)"', (FOLDER / "node" / "package.json").read_text()))
    for name, found in stored.items():
        assert found["versions"] and set(found["versions"].items()) <= pinned, name


def test_a_row_counts_cases_and_shows_failures() -> None:
    cases = [dict(feature="plain", ok=True), dict(feature="tools", ok=True), dict(feature="tools", ok=False)]
    found = dict(versions={"some-client": "1.2"}, cases=cases, notes=["one way", "another"])
    assert list(table.rows({"some": found}))[2:] == [
        "| some | some-client 1.2 | 1 |  | **1 of 2** |  |  | one way; another |"
    ]
