"""Thresholds of the benchmarks under perf/, each with its reason: `gates.yaml`, by the name of the test.

Knows names and numbers; what is measured, the tests know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("gates.yaml")


@dataclass(frozen=True)
class Gate:
    """A ratio `of` something must be at least `least`, or at most `most`."""

    name: str
    of: str
    why: str
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if (self.least is None) == (self.most is None):
            raise ValueError(f"{self.name}: give least or most")

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"

    def check(self, reached: float) -> None:
        """Print what was reached; raises AssertionError beyond the gate."""
        print(f"\n{self.name}: {reached:.3g} x {self.of} ({self})")
        missed = reached < self.least if self.least is not None else reached > (self.most or 0)
        assert not missed, f"{self.name}: {reached:.3f} x {self.of}, must be {self}: {self.why}"


def gates() -> dict[str, Gate]:
    """All of them. Raises TypeError or ValueError for an entry that is none."""
    return {name: Gate(name, **entry) for name, entry in yaml.safe_load(FILE.read_text()).items()}
