"""The table of docs/clients.md, made of the files in tests/clients/results.

    python -m tests.clients.table --write    # fills the table
    python -m tests.clients.table            # prints it

Knows the files; runs no client.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any

from tests.clients.clients import RESULTS
from tests.paths import ROOT

DOCUMENT = ROOT / "docs" / "clients.md"
FEATURES = ("plain", "stream", "tools", "structured", "embeddings")
PLACE = re.compile(r"(<!-- table: clients -->\n).*?(<!-- end of table -->)", re.S)


def rows(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table's lines; a cell is how many cases of a feature passed, of how many where some failed."""
    yield "| client | version | " + " | ".join(FEATURES) + " | notes |"
    yield "|---" * (3 + len(FEATURES)) + "|"
    for name, found in results.items():
        versions = [f"{package} {version}" for package, version in found["versions"].items()]
        counts = (passed(found["cases"], feature) for feature in FEATURES)
        yield f"| {name} | {', '.join(versions)} | {' | '.join(counts)} | {'; '.join(found['notes'])} |"


def passed(cases: list[dict[str, Any]], feature: str) -> str:
    """How many of a feature's cases passed; empty where a client has none."""
    of_feature = [case["ok"] for case in cases if case["feature"] == feature]
    if all(of_feature):
        return str(len(of_feature) or "")
    return f"**{sum(of_feature)} of {len(of_feature)}**"


def stored() -> dict[str, dict[str, Any]]:
    """What each client reported when it was run last."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def filled(text: str, results: dict[str, dict[str, Any]]) -> str:
    """A document with the table in its place."""
    return PLACE.sub(lambda found: found[1] + "\n".join(rows(results)) + "\n" + found[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="fill the table of the document")
    if parser.parse_args().write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), stored()))
    else:
        print("\n".join(rows(stored())))


if __name__ == "__main__":
    main()
