"""Every causal-LM, image-text and speech type of transformers, tiny and random: right against its own eager forward, or refused,
never wrong, and as docs/models.md says.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compiler.model.coverage import (
    PAGE,
    README,
    STATUSES,
    Outcome,
    kinds,
    outcome_of,
    page,
    readme_row,
    rows_of,
    versions,
)  # fmt: skip

# Right by ways that no test of `architectures` or of popular folders takes.
QUICK = ("bart", "chameleon", "mllama", "qwen2_audio")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in kinds()]
)
def test_right_or_refused(kind: str, tmp_path: Path) -> None:
    found = outcome_of(kind, tmp_path)
    assert found == rows_of(PAGE.read_text())[kind]


def test_the_page_is_of_these_versions_and_of_every_type() -> None:
    """`python -m tests.compiler.model.coverage --write` makes it anew."""
    text = PAGE.read_text()
    rows = rows_of(text)
    assert versions() in text
    assert sorted(rows) == kinds()
    assert text == page(rows)
    assert {one.status for one in rows.values()} <= set(STATUSES)


def test_the_readme_names_what_the_page_has() -> None:
    assert readme_row(rows_of(PAGE.read_text())) in README.read_text().splitlines()


def test_a_family_is_named_where_all_of_its_types_are_right() -> None:
    rows = dict.fromkeys(kinds(), Outcome("refused")) | {kind: Outcome("right") for kind in ("phi", "phi3", "gpt2")}
    assert readme_row(rows).startswith("| models | GPT-2 and others: 3 of ")
