"""Whether a new engine follows when one ends, and when it is expected: a file of the server's folder.

The supervisor writes it, web processes read it. Knows no processes and no sockets. Imports no torch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

FILE = "comeback.json"
UNKNOWN_S = 1.0  # before the supervisor has seen that the engine ended


def text(follows: bool, expected_s: float | None = None) -> str:
    """What the file holds: whether a new engine follows, and in how many seconds from now; None: none is being started."""
    return json.dumps({"follows": follows, "at": None if expected_s is None else time.time() + expected_s})


def is_started(path: Path | None) -> bool:
    """Whether a new engine is being started now."""
    told = _told(path)
    return told is not None and told["at"] is not None


def seconds(path: Path | None) -> float | None:
    """Seconds until a new engine is expected, a guess and at least 1; None where none follows, or nobody would start one."""
    told = _told(path)
    if told is None or not told["follows"]:
        return None
    return UNKNOWN_S if told["at"] is None else max(told["at"] - time.time(), 1.0)


def _told(path: Path | None) -> dict[str, Any] | None:
    try:
        return None if path is None else json.loads(path.read_text())
    except FileNotFoundError:  # the server ends: its folder is gone
        return None
