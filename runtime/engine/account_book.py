"""Where the accounts of keys stand: in this process, or in a file that several engines of a server write in turn.

An entry holds the buckets, which are the key's whichever engine it asks, and what other engines have of its sequences: how
many, and the tokens that these owe. An engine that ends loses its own part with its sequences; the buckets stay. Knows no
limits and no clock.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pagegraph.runtime.ipc.protocol import Quota

_WAIT_S = 5.0  # for another engine, which holds the file for some tenths of a millisecond


@dataclass(slots=True)
class Bucket:
    """`level` at the time `at`, of at most `limit`, which come back in a minute."""

    limit: int
    level: float
    at: float

    def fill(self, now: float, owed: float = 0.0) -> None:
        """To the level of now; `owed` is still to be paid from it."""
        self.level = min(self.level + (now - self.at) * self.limit / 60, self.limit + owed)
        self.at = now

    def wait_s(self, wanted: float) -> float:
        """Seconds until so much is in it, or it is full."""
        return max(min(wanted, self.limit) - self.level, 0.0) * 60 / self.limit

    def quota(self, owed: float) -> Quota:
        """What is left once `owed` is paid."""
        level = self.level - owed
        return Quota(self.limit, max(int(level), 0), (self.limit - level) * 60 / self.limit)


@dataclass(slots=True)
class Entry:
    """Of one key. `running` and `owed` are this engine's part."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: int = 0
    owed: int = 0
    others_running: int = 0
    others_owed: int = 0


class Book(Protocol):
    """Entries by the name of an asker."""

    is_shared: bool

    def open(self, name: str) -> contextlib.AbstractContextManager[Entry]:
        """The entry, new where there was none; what is changed of it stays."""
        ...


class OwnBook:
    """Of the only engine."""

    is_shared = False

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Entry]:
        yield self._entries.setdefault(name, Entry())


class SharedBook:
    """In the file `path`, which is made where it is not there; `rank`: this engine's. Nobody else has an entry while it is open."""

    is_shared = True

    def __init__(self, path: Path, rank: int) -> None:
        self._rank = rank
        self._file = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = OFF")  # it ends with the server
        with self._alone():
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS buckets (name, kind, most, level, at, PRIMARY KEY (name, kind))"
            )
            self._file.execute("CREATE TABLE IF NOT EXISTS parts (name, rank, running, owed, PRIMARY KEY (name, rank))")
            self._file.execute("DELETE FROM parts WHERE rank = ?", (rank,))  # of an engine before this one

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Entry]:
        with self._alone():
            buckets = self._file.execute("SELECT kind, most, level, at FROM buckets WHERE name = ?", (name,))
            found = {kind: Bucket(*rest) for kind, *rest in buckets}
            entry = Entry(found.get("requests"), found.get("tokens"))
            for rank, running, owed in self._file.execute(
                "SELECT rank, running, owed FROM parts WHERE name = ?", (name,)
            ):
                if rank == self._rank:
                    entry.running, entry.owed = running, owed
                else:
                    entry.others_running += running
                    entry.others_owed += owed
            yield entry
            for kind in ("requests", "tokens"):
                if (bucket := getattr(entry, kind)) is not None:
                    self._file.execute(
                        "REPLACE INTO buckets VALUES (?, ?, ?, ?, ?)",
                        (name, kind, bucket.limit, bucket.level, bucket.at),
                    )
            part = (name, self._rank, entry.running, entry.owed)
            self._file.execute("REPLACE INTO parts VALUES (?, ?, ?, ?)", part)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")
