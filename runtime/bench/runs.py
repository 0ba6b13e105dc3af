"""Stored runs of `runtime bench`, read back: what kind each is, its name, its figures.

Files of vLLM's benches have the same keys and are read too. Knows no plots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagegraph.runtime.bench.measures import METRICS, Figures

# kind: keys that a file of it has
KINDS = {
    "serve": ("duration", "completed", "output_throughput"),
    "throughput": ("elapsed_time", "tokens_per_second"),
    "latency": ("avg_latency", "latencies"),
    "startup": ("avg_cold_startup_time", "avg_warm_startup_time"),
}
DETAIL = ("ttfts", "itls")  # lists that --save-detailed adds, of equal length


@dataclass(frozen=True)
class Run:
    """One run by the name it is shown with."""

    name: str
    kind: str
    figures: Figures

    @property
    def is_detailed(self) -> bool:
        return all(key in self.figures for key in DETAIL)

    @property
    def series(self) -> str:
        """Runs of one series differ in how much is asked of the server at once."""
        return str(self.figures.get("label") or self.figures.get("backend") or self.name)

    def seconds(self, metric: str) -> np.ndarray:
        """Every value of a metric of METRICS over the requests that succeeded; none without detail."""
        if not self.is_detailed:
            return np.empty(0)
        answers = self.answers()
        values: Iterable[float]
        if metric == "itl":
            values = [gap for one in answers for gap in one.gaps]
        elif metric == "ttft":
            values = [one.ttft for one in answers]
        elif metric == "e2el":
            values = [one.ttft + sum(one.gaps) for one in answers]
        else:
            values = [sum(one.gaps) / (one.tokens - 1) for one in answers if one.tokens > 1]
        return np.asarray(values, float)

    def answers(self) -> list[Answer]:
        """The requests that succeeded, in the order of their start; times count from the first one's arrival."""
        found = self.figures
        count = len(found["ttfts"])
        errors = found.get("errors") or [""] * count
        starts = found.get("start_times") or [math.nan] * count
        queued = found.get("queue_times") or [0.0] * count
        tokens = found.get("output_lens") or [1 + len(gaps) for gaps in found["itls"]]
        answers = [
            Answer(starts[at], queued[at], found["ttfts"][at], tuple(found["itls"][at]), tokens[at])
            for at in range(count)
            if not errors[at]
        ]
        first = min((one.start - one.queued for one in answers), default=0.0)
        answers = [Answer(one.start - first, one.queued, one.ttft, one.gaps, one.tokens) for one in answers]
        return sorted(answers, key=lambda one: one.start)


@dataclass(frozen=True)
class Answer:
    """One request: when it was sent, how long it waited in the client before, its first event and the gaps behind."""

    start: float  # nan in files that do not say it
    queued: float
    ttft: float
    gaps: tuple[float, ...]
    tokens: int

    @property
    def events(self) -> np.ndarray:
        """When each event came."""
        return self.start + self.ttft + np.concatenate([[0.0], np.cumsum(self.gaps)])


def of_figures(figures: Mapping[str, Any], name: str) -> Run:
    """Raises ValueError if they are of no bench or lack what its files have."""
    kind = next((kind for kind, keys in KINDS.items() if all(key in figures for key in keys)), None)
    if kind is None:
        raise ValueError("is no file of runtime bench: give one that --save-result or --output-json wrote")
    run = Run(name, kind, dict(figures))
    if run.is_detailed and len(figures["ttfts"]) != len(figures["itls"]):
        raise ValueError(f"has {len(figures['ttfts'])} ttfts and {len(figures['itls'])} itls; they are one a request")
    return run


def read(paths: Sequence[Path]) -> list[Run]:
    """One run a file, named by its file, in the order given. Raises ValueError that names the file."""
    found: list[Run] = []
    for path in paths:
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(figures, dict):
                raise ValueError("is no JSON object")
            found.append(of_figures(figures, _free(path.stem, [run.name for run in found])))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: is not JSON ({error})") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return found


def load_axis(runs: Sequence[Run]) -> tuple[str, list[float]] | None:
    """(label of the axis, where each run of `serve` stands on it): the rate, or else the concurrency; None if they do not differ."""
    for key, label in (("request_rate", "request rate (requests/s)"), ("max_concurrency", "requests at once")):
        values = [_number(run.figures.get(key)) for run in runs]
        if len(set(values)) > 1 and all(map(math.isfinite, values)):
            return label, values
    return None


def statistics_of(runs: Sequence[Run], metric: str) -> list[str]:
    """Names of the statistics of a metric that all runs hold: median, p90, p99 and others; mean where there are no others."""
    suffix = f"_{metric}_ms"
    held = [{key.removesuffix(suffix) for key in run.figures if key.endswith(suffix)} for run in runs]
    common = set.intersection(*held) if held else set()
    ranks = sorted(
        (name for name in common if name[0] == "p" and _is_number(name[1:])), key=lambda name: float(name[1:])
    )
    named = [name for name in ("median",) if name in common and "p50" not in common]
    return [*named, *ranks] or [name for name in ("mean",) if name in common]


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """The metrics that all runs hold figures of."""
    return [metric for metric in METRICS if statistics_of(runs, metric)]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.inf


def _is_number(text: str) -> bool:
    return math.isfinite(_number(text))


def _free(name: str, taken: Sequence[str]) -> str:
    return next(
        one
        for number in range(1, len(taken) + 2)
        if (one := name if number == 1 else f"{name} ({number})") not in taken
    )
