"""A line of the log every few seconds while there is work, in the words of vLLM's: throughput, requests, KV cache, prefix hits.

Rates are of the time since the line before, or since the work began; the hit rate is of the prompts that started meanwhile.
Knows counters and the clock's times; knows no metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pagegraph.runtime.engine.metrics import Counts
from pagegraph.runtime.server.logs import FIELDS

log = logging.getLogger("pagegraph.engine")


class StatusLine:
    """`interval_s` 0: no lines."""

    def __init__(self, interval_s: float, counts: Callable[[], Counts]) -> None:
        self._interval_s = interval_s
        self._counts = counts
        self._begun: float | None = None  # of the stretch that the next line is about; None: idle
        self._before: Counts | None = None

    def look(self, now: float, idle: bool) -> None:
        """Called again and again, also while nothing happens: write a line when it is due, and when work has ended."""
        if not self._interval_s:
            return
        if self._begun is None:
            if not idle:
                self._begun, self._before = now, self._counts()
        elif now - self._begun >= self._interval_s:
            self._write(now)
            self._begun, self._before = (None, None) if idle else (now, self._counts())

    def _write(self, now: float) -> None:
        assert self._begun is not None and self._before is not None
        counts, seconds = self._counts(), now - self._begun
        new, old = counts.scheduled, self._before.scheduled
        queries = new.prefix_queries - old.prefix_queries
        computed = (new.prompt_tokens - new.cached_tokens) - (old.prompt_tokens - old.cached_tokens)
        fields = {
            "prompt_tokens_per_s": round(computed / seconds, 1),
            "generation_tokens_per_s": round((new.generated_tokens - old.generated_tokens) / seconds, 1),
            "running": counts.num_running,
            "waiting": counts.num_waiting,
            "kv_cache_usage": round(100 * counts.kv_cache_usage, 1),
            "prefix_cache_hit_rate": round(100 * (new.prefix_hits - old.prefix_hits) / queries, 1) if queries else None,
        }
        hits = "none asked" if queries == 0 else f"{fields['prefix_cache_hit_rate']}%"
        log.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs,"
            " Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %s",
            *list(fields.values())[:5],
            hits,
            extra={FIELDS: fields},
        )
