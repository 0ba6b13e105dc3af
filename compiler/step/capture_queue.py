"""The capture queue: which CUDA graphs are not captured yet, how many steps wanted each, and which is next.

A draft graph is a bucket's decode several times over. Knows buckets alone; captures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagegraph.compiler.step.capture_sizes import Bucket

# So many steps wanted a graph: it is captured at once, even if that holds others up.
CAPTURE_NOW = 64
# So many steps wanted a draft graph: it is captured in idle time. Which there will be is not known before.
CAPTURE_IDLE = 8
MAX_DRAFT_FORWARDS = 128  # in all draft graphs together: each forward takes the driver's memory of a graph


class CaptureQueue:
    """Buckets that are not captured yet, and how many steps have wanted each.

    Draft graphs are added when they are first wanted, while `MAX_DRAFT_FORWARDS` leaves room.
    """

    def __init__(self, buckets: Sequence[Bucket] = ()) -> None:
        self._wanted = dict.fromkeys(sorted(buckets), 0)
        self._room = MAX_DRAFT_FORWARDS

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self._wanted

    def want(self, bucket: Bucket) -> bool:
        """Count a step that would run in it -> whether to capture it now."""
        if not self._fits(bucket):
            return False
        self._wanted[bucket] = self._wanted.get(bucket, 0) + 1
        return self._wanted[bucket] >= CAPTURE_NOW

    def next(self) -> Bucket | None:
        """The most wanted, of equals the smallest; None if only draft graphs are left that are hardly wanted."""
        ready = [bucket for bucket, wanted in self._wanted.items() if bucket.num_steps == 1 or wanted >= CAPTURE_IDLE]
        return max(ready, key=self._wanted.__getitem__, default=None)

    def done(self, bucket: Bucket) -> None:
        """It is captured now."""
        self._wanted.pop(bucket, None)
        if bucket.num_steps > 1:
            self._room -= bucket.num_steps
            self._wanted = {one: wanted for one, wanted in self._wanted.items() if self._fits(one)}

    def _fits(self, bucket: Bucket) -> bool:
        return bucket.num_steps == 1 or bucket.num_steps <= self._room
