"""The running sequences, in the order of `Sequence.place`, and the columns that stay as they are while nobody joins or
leaves.

Does not know blocks, nor why sequences join or leave.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator

import numpy as np

from pagegraph.runtime.scheduler.input_batch import Fixed, InputBatch
from pagegraph.runtime.scheduler.sequence import Sequence, place_of


class Running:
    """Sequences that hold a slot and blocks."""

    def __init__(self, batch: InputBatch) -> None:
        self._batch = batch
        self._sequences: list[Sequence] = []
        self.by_asker: Counter[str] = Counter()  # how many of each
        self._fixed: Fixed | None = None  # of all of them, until somebody joins or leaves
        self.ones, self.trues = np.zeros(0, np.int32), np.zeros(0, bool)  # as many as `fixed` has

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def last(self) -> Sequence:
        """The first to give way: the last of the asker that has the most.

        So the first of all gives way after all others, and somebody always gets on.
        """
        most = max(self.by_asker.values())
        return next(one for one in reversed(self._sequences) if self.by_asker[one.asker] == most)

    def join(self, sequence: Sequence) -> None:
        """It has its slot."""
        insort(self._sequences, sequence, key=place_of)
        self.by_asker[sequence.asker] += 1
        self._fixed = None

    def leave(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        self.by_asker[sequence.asker] -= 1
        self._fixed = None

    def fixed(self) -> Fixed:
        """Of all of them, in order: the same arrays while nobody joins or leaves."""
        if self._fixed is None:
            slots = np.fromiter((sequence.slot for sequence in self._sequences), np.int32, len(self._sequences))
            self._fixed = self._batch.fixed(slots)
            self.ones, self.trues = np.ones(len(slots), np.int32), np.ones(len(slots), bool)
        return self._fixed

    def fixed_of(self, slots: np.ndarray) -> Fixed:
        """Of these slots; there already if they are the very array that `fixed` gave."""
        kept = self._fixed
        return kept if kept is not None and slots is kept.slots else self._batch.fixed(slots)
