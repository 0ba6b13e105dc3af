"""States of prefixes that were kept: by them a sequence whose first blocks are cached goes on behind those blocks.

Blocks hold keys and values of every token, a slot the recurrent state behind its last one alone. So the state is copied
where it is worth it, into rows of the same pools behind those of slots: at the last block border of a prompt, from which
the next turn of a conversation goes on, and where others had the same blocks but nobody had kept the state, from which the
next one goes on. A chunk of a prompt ends there. Rows go to the least recently used. Copies are made before the next step,
in the order in which they were decided; until then nothing changes a slot's state. Knows hashes and numbers, no tensors.
"""

from __future__ import annotations

from collections import OrderedDict

from pagegraph.runtime.scheduler.sequence import Sequence

LEAST_TOKENS = 64  # of a prefix that is worth a copy: fewer are computed anew as fast


class StateSnapshots:
    """`num_rows` rows of the pools from `first_row` on."""

    def __init__(self, num_rows: int, first_row: int, block_size: int) -> None:
        self.num_rows = num_rows
        self._first_row, self._block_size = first_row, block_size
        self.clear()

    def clear(self) -> None:
        """Nothing is kept, and nothing is to be copied."""
        self._free = list(range(self._first_row, self._first_row + self.num_rows))
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # of a prefix's last block, the least recently used first
        self._reached: list[tuple[bytes, int]] = []  # prefixes that slots have just computed
        self._copies: list[tuple[int, int]] = []  # from a row to a row

    def __len__(self) -> int:
        return len(self._rows)

    def usable(self, sequence: Sequence, blocks: list[int]) -> list[int]:
        """Of cached blocks of a waiting sequence's prefix, those up to the last behind which the state is kept.

        Says in the sequence where its chunks are to end.
        """
        hashes, size = sequence.prefix.hashes, self._block_size
        kept = next((n for n in range(len(blocks), 0, -1) if hashes[n - 1] in self._rows), 0)
        borders = {len(blocks) * size, (len(sequence.tokens) - 1) // size * size}
        sequence.prefix.state_ends = [at for at in sorted(borders) if at > kept * size and at >= LEAST_TOKENS]
        return blocks[:kept]

    def wanted(self, sequence: Sequence, computed: int, wanted: int) -> int:
        """Of `wanted` tokens behind the computed ones, those up to where the state is to be kept."""
        ends = (at - computed for at in sequence.prefix.state_ends if at > computed)
        return min(next(ends, wanted), wanted)

    def entered(self, sequence: Sequence, computed: int) -> None:
        """The sequence goes on in its slot behind `computed` tokens, which `usable` has found."""
        if computed:
            digest = sequence.prefix.hashes[computed // self._block_size - 1]
            self._rows.move_to_end(digest)
            self._copies.append((self._rows[digest], sequence.slot))

    def advanced(self, sequence: Sequence, computed: int) -> None:
        """The step being planned brings the sequence to so many tokens, whose blocks are published."""
        if computed in sequence.prefix.state_ends:
            self._reached.append((sequence.prefix.hashes[computed // self._block_size - 1], sequence.slot))

    def begin_step(self) -> None:
        """Another step is to be planned: states that the last one left are kept."""
        for digest, slot in self._reached:
            if digest in self._rows:
                self._rows.move_to_end(digest)
                continue
            row = self._free.pop() if self._free else self._rows.popitem(last=False)[1]
            self._rows[digest] = row
            self._copies.append((slot, row))
        self._reached.clear()

    def take_copies(self) -> list[tuple[int, int]]:
        """(from row, to row), to be copied in this order before the step that is launched next."""
        copies, self._copies = self._copies, []
        return copies
