"""The queue: sequences that wait for a slot, and the prompt tokens they bring.

Those of one asker are in the order of `Sequence.place`. Of several askers the one with the fewest running sequences is next,
so that nobody's sequences wait for all of another's, whatever priority those claim; a preempted sequence is next whoever asked. Knows no slots, blocks or reasons.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pagegraph.runtime.scheduler.sequence import Sequence, State, place_of


@dataclass(slots=True)
class _Line:
    """One asker's, in order."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0


class Waiting:
    """Sequences in order. `num_tokens`: of all their prompts, what the prefix cache may hold of them too.

    `running`: how many sequences each asker has running, looked at when it is asked who is next.
    """

    def __init__(self, running: Mapping[str, int], sequences: Iterable[Sequence] = ()) -> None:
        self.num_tokens = 0
        self._running = running
        self._lines: dict[str, _Line] = {}  # of askers who have somebody waiting
        self._count = 0
        for sequence in sequences:
            self.join(sequence)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """All, in no order."""
        for line in self.lines:
            yield from line

    @property
    def lines(self) -> list[list[Sequence]]:
        """The sequences of each asker, in order."""
        return [line.sequences for line in self._lines.values()]

    def of(self, asker: str) -> tuple[int, int]:
        """How many sequences of one asker wait, and the tokens of their prompts."""
        line = self._lines.get(asker)
        return (0, 0) if line is None else (len(line.sequences), line.num_tokens)

    def first(self, count: int) -> list[Sequence]:
        """Up to so many, from the front."""
        if len(self._lines) <= 1:
            return [sequence for line in self.lines for sequence in line[:count]]
        heads = [self._head(asker, 0) for asker in self._lines]
        heapq.heapify(heads)
        found: list[Sequence] = []
        while heads and len(found) < count:
            *_, asker, taken = heads[0]
            found.append(self._lines[asker].sequences[taken])
            if taken + 1 < len(self._lines[asker].sequences):
                heapq.heapreplace(heads, self._head(asker, taken + 1))
            else:
                heapq.heappop(heads)
        return found

    def join(self, sequence: Sequence) -> None:
        line = self._lines.setdefault(sequence.asker, _Line())
        insort(line.sequences, sequence, key=place_of)
        line.num_tokens += sequence.num_prompt
        self.num_tokens += sequence.num_prompt
        self._count += 1

    def leave(self, sequence: Sequence) -> None:
        line = self._lines[sequence.asker]
        line.sequences.remove(sequence)
        line.num_tokens -= sequence.num_prompt
        if not line.sequences:
            del self._lines[sequence.asker]
        self.num_tokens -= sequence.num_prompt
        self._count -= 1

    def _head(self, asker: str, taken: int) -> tuple[bool, int, tuple[int, float, int], str, int]:
        """Sort key of an asker whose first `taken` sequences have had their turn: by its next one."""
        sequence = self._lines[asker].sequences[taken]
        share = self._running.get(asker, 0) + taken
        begun = sequence.state is State.PREEMPTED
        return (not begun, share, sequence.place, asker, taken)
