"""The capture queue: which CUDA graphs are not captured yet, how many steps wanted each, and which is next.

A draft graph is a bucket's decode several times over. The order in which a start has captured its buckets, wanted ones first,
serves the next start of the same model: what was wanted early is captured early. Knows buckets; captures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from pagegraph.compiler.start_cache import StartCache
from pagegraph.compiler.step.capture_sizes import Bucket

# So many steps wanted a graph: it is captured at once, even if that holds others up.
CAPTURE_NOW = 64
# So many steps wanted a draft graph: it is captured in idle time. Which there will be is not known before.
CAPTURE_IDLE = 8
MAX_DRAFT_FORWARDS = 128  # in all draft graphs together: each forward takes the driver's memory of a graph


class CaptureQueue:
    """Buckets that are not captured yet, and how many steps have wanted each.

    Draft graphs are added when they are first wanted, while `MAX_DRAFT_FORWARDS` leaves room.

    order: in which an earlier start captured them. captured: told this start's order when none but draft graphs are left.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket] = (),
        order: Sequence[Bucket] = (),
        captured: Callable[[list[Bucket]], None] = lambda order: None,
    ) -> None:
        place = {bucket: at for at, bucket in enumerate(order)}
        self._wanted = dict.fromkeys(sorted(buckets, key=lambda one: (place.get(one, len(place)), one)), 0)
        self._room = MAX_DRAFT_FORWARDS
        self._order: list[Bucket] = []
        self._captured = captured

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self._wanted

    def want(self, bucket: Bucket) -> bool:
        """Count a step that would run in it -> whether to capture it now."""
        if not self._fits(bucket):
            return False
        self._wanted[bucket] = self._wanted.get(bucket, 0) + 1
        return self._wanted[bucket] >= CAPTURE_NOW

    def next(self) -> Bucket | None:
        """The most wanted, of equals the first in order, else the smallest; None if only draft graphs are left that are hardly wanted."""
        ready = [bucket for bucket, wanted in self._wanted.items() if bucket.num_steps == 1 or wanted >= CAPTURE_IDLE]
        return max(ready, key=self._wanted.__getitem__, default=None)

    def done(self, bucket: Bucket) -> None:
        """It is captured now."""
        missing = self._wanted.pop(bucket, None) is not None
        if missing and bucket.num_steps == 1:
            self._order.append(bucket)
            if all(one.num_steps > 1 for one in self._wanted):
                self._captured(self._order)
        if bucket.num_steps > 1:
            self._room -= bucket.num_steps
            self._wanted = {one: wanted for one, wanted in self._wanted.items() if self._fits(one)}

    def _fits(self, bucket: Bucket) -> bool:
        return bucket.num_steps == 1 or bucket.num_steps <= self._room


class StoredOrder:
    """The order in which an earlier start captured its graphs, in the start cache."""

    def __init__(self, cache: StartCache, name: str) -> None:
        self._cache = cache
        self._name = name

    def read(self) -> list[Bucket]:
        """Empty where there is none."""
        content = self._cache.read(self._name)
        return [Bucket(*one) for one in json.loads(content)] if content else []

    def write(self, order: list[Bucket]) -> None:
        """For later starts, which may have other sizes."""
        self._cache.write(self._name, json.dumps([(one.tokens, one.seqs) for one in order]).encode())
