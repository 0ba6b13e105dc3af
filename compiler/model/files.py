"""The small files of a model folder: JSON objects, and files that only point at their content.

Knows no model, and neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {lfs_pointer(path) or error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def lfs_pointer(path: Path) -> str:
    """What to do about a file that is only a Git LFS pointer; empty if it is none."""
    with path.open("rb") as file:
        pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    return (
        "it is a pointer of Git LFS and not the file itself; run `git lfs pull` in its folder, or download the file"
        if pointer
        else ""
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as an indented JSON object."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
