"""Responses that may be asked for again, by any web process of the server: a database file in its private folder.

Bounded in bytes and in age; the oldest go first. It lives as long as the server. Knows ids and JSON, nothing of what it
means.
"""

from __future__ import annotations

import copy
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

_log = logging.getLogger(__name__)

MAX_AGE_S = 24 * 3600.0
_MAX_CLOSED = 10_000  # closed or deleted ones whose ids are remembered, for whoever still makes one of them
_COMPRESSION = 1  # of 9: the fastest
_BUSY_S = 5.0  # that another process may hold the file
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (id TEXT PRIMARY KEY, created REAL, size INTEGER, stored BLOB) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_age ON responses (created);
CREATE TABLE IF NOT EXISTS items (id TEXT PRIMARY KEY, response TEXT, item BLOB) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_response ON items (response);
CREATE TABLE IF NOT EXISTS closed (id TEXT PRIMARY KEY, created REAL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Stored:
    """One response: its JSON, the items of its own input, and those of the responses before it."""

    response: dict[str, Any]
    input: list[dict[str, Any]]
    before: list[dict[str, Any]] = field(default_factory=list)
    owner: int = field(default_factory=os.getpid)  # the process that makes it

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All items up to and with its output: what the next response goes on from."""
        return [*self.before, *self.input, *self.response["output"]]

    @property
    def owner_lives(self) -> bool:
        """Whether the process that makes it is there."""
        try:
            os.kill(self.owner, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's, who got its number
            return False
        return True


class ResponseStore:
    """Responses by id, and their output items by theirs. Thread-safe; processes share the file, and askers do.

    `path` None: a store of this process alone. Of `max_bytes` 0 nothing is kept.
    """

    def __init__(
        self,
        path: str | Path | None,
        max_bytes: int,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.keeps = max_bytes > 0
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._asker = ""
        self._lock = threading.Lock()
        if path is not None:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # sqlite's other files take this one's mode
        self._database = sqlite3.connect(
            path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        # The file ends with the server, so no write need reach the disk before it is seen.
        for setting in ("journal_mode = WAL", "synchronous = OFF", "secure_delete = ON"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.executescript(_TABLES)

    def of(self, asker: str) -> ResponseStore:
        """The same store as one asker sees it, who cannot see another's responses."""
        own = copy.copy(self)
        own._asker = asker
        return own

    def put(self, stored: Stored) -> bool:
        """Keep a response in place of one of its id, and make room; whether it is kept: never once it is closed."""
        return self._put(stored, close=False)

    def close_with(self, stored: Stored) -> bool:
        """`put`, after which no other comes in its place."""
        return self._put(stored, close=True)

    def is_closed(self, id: str) -> bool:
        """Whether the response was closed or deleted: nobody waits for what may come of it."""
        with (
            self._lock,
            closing(self._database.execute("SELECT 1 FROM closed WHERE id = ?", (self._own(id),))) as found,
        ):
            return found.fetchone() is not None

    def get(self, id: str) -> Stored | None:
        """A response, or None if it is unknown or gone."""
        row = self._row("SELECT stored FROM responses WHERE id = ? AND created >= ?", id)
        return None if row is None else Stored(*msgspec.json.decode(zlib.decompress(row[0])))

    def item(self, id: str) -> dict[str, Any] | None:
        """An output item of any response that is kept."""
        query = "SELECT item FROM items JOIN responses ON items.response = responses.id WHERE items.id = ?"
        row = self._row(f"{query} AND created >= ?", id)
        return None if row is None else msgspec.json.decode(row[0])

    def delete(self, id: str) -> bool:
        """Forget a response; whether it was there."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            was_there = self._forget("id = ?", self._own(id)) > 0
            if was_there:
                self._close(self._own(id))
            return was_there

    def close(self) -> None:
        """Nothing may be asked after it."""
        with self._lock:
            self._database.close()

    def _own(self, id: str) -> str:
        """An id as the database has it."""
        return self._asker + id

    def _row(self, query: str, id: str) -> tuple[Any, ...] | None:
        oldest = self._clock() - self._max_age_s
        try:
            with self._lock, closing(self._database.execute(query, (self._own(id), oldest))) as found:
                return found.fetchone()
        except UnicodeEncodeError:  # half of a surrogate pair, which no id has
            return None

    def _put(self, stored: Stored, close: bool) -> bool:
        id, now = self._own(stored.response["id"]), self._clock()
        data = zlib.compress(
            msgspec.json.encode([stored.response, stored.input, stored.before, stored.owner]), _COMPRESSION
        )
        items = [(self._own(item["id"]), id, msgspec.json.encode(item)) for item in stored.response["output"]]
        size = len(data) + sum(len(item) for _, _, item in items)
        if size > self._max_bytes:
            return False
        try:
            with self._lock, self._database:
                self._database.execute("BEGIN IMMEDIATE")
                if not close and self._database.execute("SELECT 1 FROM closed WHERE id = ?", (id,)).fetchone():
                    return False
                if close:
                    self._close(id)
                self._database.execute("DELETE FROM items WHERE response = ?", (id,))
                self._database.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?)", (id, now, size, data))
                self._database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", items)
                self._make_room(now)
        except sqlite3.Error as error:  # a full disk, say; the answer itself is good
            _log.error("a response is not stored: %s", error)
            return False
        return True

    def _close(self, id: str) -> None:
        """Inside a transaction."""
        self._database.execute("INSERT OR REPLACE INTO closed VALUES (?, ?)", (id, self._clock()))
        (excess,) = self._database.execute("SELECT COUNT(*) - ? FROM closed", (_MAX_CLOSED,)).fetchone()
        if excess > 0:
            oldest = "SELECT id FROM closed ORDER BY created LIMIT ?"
            self._database.execute(f"DELETE FROM closed WHERE id IN ({oldest})", (excess,))

    def _make_room(self, now: float) -> None:
        """Inside a transaction: forget what is too old, then the oldest until the rest fits."""
        self._forget("created < ?", now - self._max_age_s)
        self._database.execute("DELETE FROM closed WHERE created < ?", (now - self._max_age_s,))
        (excess,) = self._database.execute("SELECT TOTAL(size) - ? FROM responses", (self._max_bytes,)).fetchone()
        while excess > 0:
            query = "SELECT id, size FROM responses ORDER BY created LIMIT 1"
            oldest, size = self._database.execute(query).fetchone()
            excess -= size
            self._forget("id = ?", oldest)

    def _forget(self, which: str, value: Any) -> int:
        """Inside a transaction: remove responses and their items; how many."""
        self._database.execute(
            f"DELETE FROM items WHERE response IN (SELECT id FROM responses WHERE {which})", (value,)
        )
        return self._database.execute(f"DELETE FROM responses WHERE {which}", (value,)).rowcount
