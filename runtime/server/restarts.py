"""How often an engine that ends is started anew, and what the server counts of it.

Knows times and reasons; starts nothing. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

REASONS = ("died", "hung")


class Restarts:
    """At most `most` within `window_s` seconds, whatever the reasons. Any thread may read."""

    def __init__(self, most: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.window_s = window_s
        self.total: dict[str, int] = dict.fromkeys(REASONS, 0)
        self._clock = clock
        self._at: list[float] = []

    @property
    def num_recent(self) -> int:
        """Within the window that ends now."""
        oldest = self._clock() - self.window_s
        return sum(at > oldest for at in self._at)

    def take(self, reason: str) -> bool:
        """Whether there is to be another, which is counted then; `reason`: one of REASONS."""
        if self.num_recent >= self.most:
            return False
        self._at.append(self._clock())
        self.total[reason] += 1
        return True


class ServerMetrics:
    """What the supervisor knows and no engine, in Prometheus' text format; an engine counts from 0 when it is new.

    That is itself as a process, too, which is as old as the server, and what the web processes count of HTTP.
    """

    def __init__(
        self, model_name: str, engines: Sequence[tuple[Restarts, Callable[[], bool]]], web_counts: Path | None = None
    ) -> None:
        """`engines`: of each, by rank, how often it was started anew and whether it takes requests; `web_counts`: folder of
        the web processes' files, in prometheus-client's form."""
        self._model_name = model_name
        self._engines = engines
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        if web_counts is not None:
            MultiProcessCollector(self._registry, path=str(web_counts))

    def render(self) -> bytes:
        """The text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Metric families as prometheus-client's registries yield them."""
        names = ["model_name", "engine"]
        up = GaugeMetricFamily("pagegraph:engine_up", "1 while the engine takes requests, else 0.", labels=names)
        restarts = CounterMetricFamily(
            "pagegraph:engine_restarts",
            "Times that the engine was started anew: it had died, or hung and was ended.",
            labels=[*names, "reason"],
        )
        for rank, (counted, is_up) in enumerate(self._engines):
            values = [self._model_name, str(rank)]
            up.add_metric(values, float(is_up()))
            for reason, count in counted.total.items():
                restarts.add_metric([*values, reason], count)
        yield up
        yield restarts
