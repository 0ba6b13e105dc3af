"""What each key has asked for of late, held against its limits: requests a minute, tokens a minute, requests at once.

A limit a minute is a bucket that holds a minute's and fills evenly. A request is taken where a request and its prompt are in
the buckets (a prompt larger than the whole bucket: where that is full), and pays for its prompt at once and for its answer as
it is generated, below nothing if need be. Here, since all web processes' requests come through the engine; several engines
of a server share a book (`account_book`). Knows no clock and no queue; what a running sequence has generated so far it is told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

from pagegraph.runtime.askers import Asker
from pagegraph.runtime.engine.account_book import Book, Bucket, Entry, OwnBook
from pagegraph.runtime.ipc.protocol import Quotas, Submit
from pagegraph.runtime.scheduler.sequence import Sequence, State

_TELL_S = 1.0  # between two times that other engines are told
_SLOT_RETRY_S = 1.0  # that a client is told to wait for a place: nobody knows when one of its answers ends


@dataclass(frozen=True)
class Refusal:
    """Why a key's request is not taken now."""

    message: str
    retry_after_s: float
    quotas: Quotas


class Accounts:
    """Of the keys that have limits. `num_generated`: tokens that a sequence has so far, wherever it is."""

    def __init__(self, num_generated: Callable[[Sequence], int], book: Book | None = None) -> None:
        self._num_generated = num_generated
        self._book = OwnBook() if book is None else book
        # By name: sequences here that wait or run, and those that have ended since it was looked at.
        self._running: dict[str, list[Sequence]] = {}
        self._askers: dict[str, Asker] = {}
        self._told_at = 0.0

    def refusal(self, submits: Many[Submit], now: float) -> Refusal | None:
        """Why the sequences of one request, which have one asker, cannot be taken now; None: they can."""
        asker = submits[0].asker
        if not asker.is_limited:
            return None
        most, wanted = asker.max_parallel_requests, _prompt_tokens(submits)
        reasons = []
        with self._open(asker, now) as entry:
            owed = entry.owed + entry.others_owed
            if entry.requests is not None and (wait_s := entry.requests.wait_s(1)):
                reasons.append((wait_s, f"requests_per_minute = {entry.requests.limit} of this key"))
            if entry.tokens is not None:
                entry.tokens.level -= owed
                if wait_s := entry.tokens.wait_s(wanted):
                    reasons.append((wait_s, f"tokens_per_minute = {entry.tokens.limit} of this key"))
                entry.tokens.level += owed
            if most is not None and entry.running + entry.others_running >= most:
                reasons.append((_SLOT_RETRY_S, f"max_parallel_requests = {most} of this key"))
            quotas = _quotas(entry)
        if not reasons:
            return None
        wait_s, limit = max(reasons)
        return Refusal(f"rate limit reached: {limit}; try again in {wait_s:.3g} s", wait_s, quotas)

    def charge(self, submits: Many[Submit], sequences: Many[Sequence], now: float) -> Quotas | None:
        """Sequences of one request are taken -> what its key has left."""
        asker = submits[0].asker
        if not asker.is_limited:
            return None
        with self._open(asker, now) as entry:
            self._running[asker.name] += sequences
            self._count(asker, entry)
            if entry.requests is not None:
                entry.requests.level -= 1
            if entry.tokens is not None:
                entry.tokens.level -= _prompt_tokens(submits)
            return _quotas(entry)

    def look(self, now: float) -> None:
        """Called again and again: tell other engines, if there are any, what became of the sequences here."""
        if self._book.is_shared and now - self._told_at >= _TELL_S:
            self._told_at = now
            for name in [name for name, running in self._running.items() if running]:
                with self._open(self._askers[name], now):
                    pass

    @contextlib.contextmanager
    def _open(self, asker: Asker, now: float) -> Iterator[Entry]:
        """Paid for what has ended, and then with its buckets filled up to now; those of a limit that is new are full."""
        running = self._running.setdefault(asker.name, [])
        self._askers[asker.name] = asker
        ended = [one for one in running if one.state is State.FINISHED]
        running[:] = [one for one in running if one.state is not State.FINISHED]
        with self._book.open(asker.name) as entry:
            if entry.tokens is not None:
                entry.tokens.level -= sum(one.num_generated for one in ended)
            self._count(asker, entry)
            entry.requests = _bucket(entry.requests, asker.requests_per_minute, now)
            entry.tokens = _bucket(entry.tokens, asker.tokens_per_minute, now, entry.owed + entry.others_owed)
            yield entry

    def _count(self, asker: Asker, entry: Entry) -> None:
        """This engine's part: sequences, and tokens that they have generated, which are paid for when they end."""
        running = self._running[asker.name]
        entry.running, entry.owed = len(running), sum(map(self._num_generated, running))


def _quotas(entry: Entry) -> Quotas:
    owed = entry.owed + entry.others_owed
    return Quotas(
        None if entry.requests is None else entry.requests.quota(0),
        None if entry.tokens is None else entry.tokens.quota(owed),
    )


def _bucket(bucket: Bucket | None, limit: int | None, now: float, owed: float = 0.0) -> Bucket | None:
    if limit is None:
        return None
    if bucket is None:
        return Bucket(limit, limit, now)
    bucket.fill(now, owed)
    return bucket


def _prompt_tokens(submits: Many[Submit]) -> int:
    """Each prompt once, however many sequences it has."""
    return sum({id(submit.token_ids): len(submit.token_ids) for submit in submits}.values())
