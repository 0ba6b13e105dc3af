"""Tells web processes that choose among engines what this engine's prefix cache holds, and how much it has to do.

Costs nothing while nobody asks. Knows web processes by the mailbox's names; knows no other engine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pagegraph.runtime.ipc.protocol import CacheChanged, ToClient
from pagegraph.runtime.scheduler.block_pool import CacheChanges
from pagegraph.runtime.scheduler.scheduler import Scheduler

TELL_S = 0.02  # between two messages at least: a chooser may be as far behind, and steps come faster


class CacheWatch:
    """`send`: a message to a web process; False: it is gone."""

    def __init__(self, scheduler: Scheduler, send: Callable[[bytes, ToClient], object]) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.block_tables.pool
        self._send = send
        self._watchers: list[bytes] = []
        self._told = (0, 0)
        self._told_at = float("-inf")

    def add(self, client: bytes, now: float) -> None:
        """From now on this web process is told; first of all that is there."""
        self._watchers = [one for one in self._watchers if one != client]
        if self._watchers:
            self._tell(now)
        else:
            self._pool.changes = CacheChanges()
        self._watchers.append(client)
        self._send(client, CacheChanged(True, self._pool.cached, [], *self._to_do()))

    def look(self, now: float) -> None:
        """Called in each turn of the loop: tell what is new, if it is time."""
        if self._watchers and now - self._told_at >= TELL_S and (self._pool.changes or self._to_do() != self._told):
            self._tell(now)

    def _tell(self, now: float) -> None:
        changes = self._pool.changes or CacheChanges()
        stored = [digest for digest, present in changes.present.items() if present]
        removed = [digest for digest, present in changes.present.items() if not present]
        self._told, self._told_at = self._to_do(), now
        message = CacheChanged(changes.cleared, stored, removed, *self._told)
        self._watchers = [client for client in self._watchers if self._send(client, message) is not False]
        self._pool.changes = CacheChanges() if self._watchers else None

    def _to_do(self) -> tuple[int, int]:
        """(sequences, tokens of their prompts that are not computed)."""
        scheduler, batch = self._scheduler, self._scheduler.batch
        missing = np.maximum(batch.num_prompt - batch.computed, 0)[batch.epoch > 0]
        return scheduler.num_running + scheduler.num_waiting, scheduler.num_waiting_tokens + int(missing.sum())
