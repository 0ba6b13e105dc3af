"""What the documents say of the tree is so: folders, files and links."""

from __future__ import annotations

import re

import pytest

from tests.paths import ROOT

PACKAGES = ("kernels", "compiler", "runtime", "web", "perf")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/bench.md",
    "docs/clients.md",
    "docs/cluster.md",
    "docs/explain.md",
    "docs/failures.md",
    "docs/models.md",
    "docs/structured.md",
    "docs/tools.md",
    "docs/tune.md",
    "docs/verify.md",
    "perf/README.md",
)


def test_the_layout_table_lists_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| `([\w/]+)/` \|", text, re.M)
    assert len(listed) == len(set(listed))
    found = {top for top in PACKAGES}
    for top in PACKAGES:
        found |= {
            str(path.relative_to(ROOT)) for path in (ROOT / top).rglob("*") if path.is_dir() and holds_files(path)
        }
    assert set(listed) == found


def holds_files(folder) -> bool:
    """Whether a folder holds more than caches."""
    return not folder.name.startswith((".", "__")) and any(path.is_file() for path in folder.iterdir())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text()
    named = set(re.findall(r"`((?:kernels|compiler|runtime|web|perf|tests|examples|configs)/[\w/.-]*)`", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    missing += [link for link in links if link and not (path.parent / link).exists()]
    assert not missing
