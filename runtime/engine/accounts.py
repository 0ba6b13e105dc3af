"""What each key has asked for of late, held against its limits: requests a minute, tokens a minute, requests at once.

A limit a minute is a bucket that holds a minute's and fills evenly. A request is taken where a request and its prompt are in
the buckets (a prompt larger than the whole bucket: where that is full), and pays for its prompt at once and for its answer as
it is generated, below nothing if need be. Here, since all web processes' requests come through the engine. Knows no clock
and no queue; what a running sequence has generated so far it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from pagegraph.runtime.askers import Asker
from pagegraph.runtime.ipc.protocol import Quota, Quotas, Submit
from pagegraph.runtime.scheduler.sequence import Sequence, State

_SLOT_RETRY_S = 1.0  # that a client is told to wait for a place: nobody knows when one of its answers ends


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


@dataclass(frozen=True)
class Refusal:
    """Why a key's request is not taken now."""

    message: str
    retry_after_s: float
    quotas: Quotas


@dataclass(slots=True)
class _Account:
    """Of one key. `running`: its sequences that wait or run, and those that have ended since it was looked at."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: list[Sequence] = field(default_factory=list)


class Accounts:
    """Of the keys that have limits. `num_generated`: tokens that a sequence has so far, wherever it is."""

    def __init__(self, num_generated: Callable[[Sequence], int]) -> None:
        self._num_generated = num_generated
        self._accounts: dict[str, _Account] = {}

    def refusal(self, submits: Many[Submit], now: float) -> Refusal | None:
        """Why the sequences of one request, which have one asker, cannot be taken now; None: they can."""
        asker = submits[0].asker
        if not asker.is_limited:
            return None
        account, owed = self._account(asker, now), self._owed(asker.name)
        most, wanted = asker.max_parallel_requests, _prompt_tokens(submits)
        reasons = []
        if account.requests is not None and (wait_s := account.requests.wait_s(1)):
            reasons.append((wait_s, f"requests_per_minute = {account.requests.limit} of this key"))
        if account.tokens is not None:
            account.tokens.level -= owed
            if wait_s := account.tokens.wait_s(wanted):
                reasons.append((wait_s, f"tokens_per_minute = {account.tokens.limit} of this key"))
            account.tokens.level += owed
        if most is not None and len(account.running) >= most:
            reasons.append((_SLOT_RETRY_S, f"max_parallel_requests = {most} of this key"))
        if not reasons:
            return None
        wait_s, limit = max(reasons)
        return Refusal(f"rate limit reached: {limit}; try again in {wait_s:.3g} s", wait_s, self._quotas(account, owed))

    def charge(self, submits: Many[Submit], sequences: Many[Sequence], now: float) -> Quotas | None:
        """Sequences of one request are taken -> what its key has left."""
        asker = submits[0].asker
        if not asker.is_limited:
            return None
        account = self._account(asker, now)
        account.running += sequences
        if account.requests is not None:
            account.requests.level -= 1
        if account.tokens is not None:
            account.tokens.level -= _prompt_tokens(submits)
        return self._quotas(account, self._owed(asker.name))

    def _owed(self, name: str) -> int:
        """Tokens that running sequences have generated, which are paid for when they end."""
        return sum(map(self._num_generated, self._accounts[name].running))

    def _account(self, asker: Asker, now: float) -> _Account:
        """Paid for what has ended, and then with its buckets filled up to now; those of a limit that is new are full."""
        account = self._accounts.setdefault(asker.name, _Account())
        ended = [one for one in account.running if one.state is State.FINISHED]
        if account.tokens is not None:
            account.tokens.level -= sum(one.num_generated for one in ended)
        account.running = [one for one in account.running if one.state is not State.FINISHED]
        account.requests = _bucket(account.requests, asker.requests_per_minute, now)
        account.tokens = _bucket(account.tokens, asker.tokens_per_minute, now, self._owed(asker.name))
        return account

    @staticmethod
    def _quotas(account: _Account, owed: int) -> Quotas:
        return Quotas(
            None if account.requests is None else account.requests.quota(0),
            None if account.tokens is None else account.tokens.quota(owed),
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
