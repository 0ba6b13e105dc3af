"""The exception for what a request asks and cannot have, and how its values are shown in such words.

Knows no parameters: those are `runtime.sampling_params`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any


class BadParameter(ValueError):
    """A request that cannot be served: `field` is at fault, and the text says what works."""

    def __init__(self, field: str, problem: str, code: str = "invalid_value") -> None:
        super().__init__(f"{field} {problem}" if code == "invalid_value" else problem)
        self.field = field
        self.problem = problem
        self.code = code


def shown(value: Any) -> str:
    """A value as the user wrote it, cut short."""
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) >= 10**20:
        return "a number of more than 64 bits"
    if isinstance(value, float) and math.isinf(value):
        return f"{'-' * (value < 0)}infinity (no number so large has 64 bits)"
    text = json.dumps(value[:80] if isinstance(value, str) else value, default=repr)
    return text if len(text) <= 80 else text[:80] + "..."
