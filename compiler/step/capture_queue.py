"""Which CUDA graphs are not captured yet, how wanted each is, and which comes next.

Pure arithmetic over buckets; captures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagegraph.compiler.step.capture_sizes import Bucket

DUE = 64  # steps that had to run otherwise after which their own bucket is captured even if that holds others up
OFTEN = (
    8  # steps that wanted a chain before it is captured in idle time: which chains there will be is not known before
)
CHAINED = 128  # forwards in all captured chains: each takes the driver's memory of a graph


class Pending:
    """Buckets that are not captured yet, and how many steps have wanted each.

    Chains are added when they are first wanted, while `CHAINED` leaves room.
    """

    def __init__(self, buckets: Sequence[Bucket] = ()) -> None:
        self._wanted = dict.fromkeys(sorted(buckets), 0)
        self._room = CHAINED

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self._wanted

    def want(self, bucket: Bucket) -> bool:
        """A step would run in it -> whether it is due."""
        if not self._fits(bucket):
            return False
        self._wanted[bucket] = self._wanted.get(bucket, 0) + 1
        return self._wanted[bucket] >= DUE

    def next(self) -> Bucket | None:
        """The most wanted, of equals the smallest; None when all are captured, but for chains that are hardly wanted."""
        ready = [bucket for bucket, wanted in self._wanted.items() if bucket.times == 1 or wanted >= OFTEN]
        return max(ready, key=self._wanted.__getitem__, default=None)

    def done(self, bucket: Bucket) -> None:
        self._wanted.pop(bucket, None)
        if bucket.times > 1:
            self._room -= bucket.times
            self._wanted = {one: wanted for one, wanted in self._wanted.items() if self._fits(one)}

    def _fits(self, bucket: Bucket) -> bool:
        return bucket.times == 1 or bucket.times <= self._room
