"""The queue: sequences that wait for a slot, in the order of `Sequence.place`, and the prompt tokens they bring.

Knows no slots, blocks or reasons.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator

from pagegraph.runtime.scheduler.sequence import Sequence, place_of


class Waiting:
    """Sequences in order. `num_tokens`: of all their prompts, what the prefix cache may hold of them too."""

    def __init__(self, sequences: Iterable[Sequence] = ()) -> None:
        self._sequences = list(sequences)
        self.num_tokens = sum(sequence.num_prompt for sequence in self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def first(self, count: int) -> list[Sequence]:
        """Up to so many, from the front."""
        return self._sequences[:count]

    def join(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=place_of)
        self.num_tokens += sequence.num_prompt

    def leave(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        self.num_tokens -= sequence.num_prompt
