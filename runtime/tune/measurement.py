"""What one run of the workload gave, and what is better: figures, counters, the objective.

Knows no engine and no keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pagegraph.runtime.bench.measures import Figures

PERCENTILES = (50, 99)


class CannotRun(Exception):
    """A configuration that could not be measured; the message says why."""


class OutOfTime(Exception):
    """The time budget is over, or too little of it is left."""


class TooSlow(Exception):
    """A run that was given up because it took much longer than the best one."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the scheduler did in a run; the highest of each after any step."""

    running: int  # sequences at once
    waiting: int
    step_tokens: int  # of a launch
    blocks: float  # share of the KV blocks in use, 0 to 1
    preemptions: int
    mixed_steps: int  # that had decodes while prompts waited
    limited_steps: int  # of those, whose prompts were cut by inter_token_target_ms
    accepted: float  # share of output tokens that would have been accepted n-gram draft tokens, 0 to 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run. `figures` are those of `runtime.bench.measures.figures`; memory: bytes of weights and KV blocks."""

    figures: Figures
    counts: Counts
    memory: int

    def as_json(self) -> dict[str, Any]:
        return self.figures | {"counts": asdict(self.counts), "memory_bytes": self.memory}


@dataclass(frozen=True, slots=True)
class Objective:
    """The most requests a second within `slos` (milliseconds by metric) or, without any, output tokens a second."""

    slos: Mapping[str, float]

    @property
    def name(self) -> str:
        return "goodput" if self.slos else "output tokens/s"

    @property
    def unit(self) -> str:
        return "requests/s" if self.slos else "tokens/s"

    def value(self, one: Measurement) -> float:
        return one.figures["request_goodput" if self.slos else "output_throughput"]

    def grain(self, one: Measurement) -> float:
        """The least that the value can differ by: one request, where they are counted."""
        return 1 / one.figures["duration"] if self.slos else 0.0

    def tail(self, one: Measurement) -> float:
        """What settles ties, less is better: the p99 that is the worst for its limit, in limits; else the p99 of a whole
        answer in milliseconds.
        """
        if not self.slos:
            return one.figures["p99_e2el_ms"]
        return max((one.figures[f"p99_{name}_ms"] or 0.0) / limit for name, limit in self.slos.items())
