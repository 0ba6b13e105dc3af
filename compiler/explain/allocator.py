"""Bytes that PyTorch's CUDA allocator takes of a device for tensors that come and go: what it rounds, splits and keeps.

Its default settings: blocks of 512 bytes, small ones in segments of 2 MiB, middle ones in segments of 20, large ones in
segments of their own; a free block is taken if it is the least that is large enough, split if enough is left, and joined
with free neighbours. Nothing goes back. Knows sizes only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 1 << 20
BLOCK = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB  # up to so much is small
MIDDLE, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB  # below so much is middle
LARGE_ROUND = 2 * MIB


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a segment."""

    size: int
    segment: int
    start: int
    small: bool


class CachingAllocator:
    """`reserved`: bytes of the device; `used`: of blocks that are given out; `most`: as many as were used at a time."""

    def __init__(self) -> None:
        self.reserved = self.used = self.most = 0
        self._segments = 0
        self._free: set[Block] = set()

    def take(self, size: int) -> Block:
        """A block of at least so many bytes."""
        size = max(-(-size // BLOCK), 1) * BLOCK
        small = size <= SMALL
        fitting = [one for one in self._free if one.small == small and one.size >= size]
        if fitting:
            found = min(fitting, key=lambda one: one.size)
            self._free.remove(found)
        else:
            found = self._segment(size, small)
        rest = found.size - size
        if rest >= BLOCK if small else rest > SMALL:
            self._free.add(replace(found, size=rest, start=found.start + size))
            found = replace(found, size=size)
        self.used += found.size
        self.most = max(self.most, self.used)
        return found

    def give_back(self, block: Block) -> None:
        self.used -= block.size
        for one in [one for one in self._free if one.segment == block.segment]:
            if one.start + one.size == block.start or block.start + block.size == one.start:
                self._free.remove(one)
                block = replace(block, size=block.size + one.size, start=min(block.start, one.start))
        self._free.add(block)

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            whole = SMALL_SEGMENT
        else:
            whole = MIDDLE_SEGMENT if size < MIDDLE else -(-size // LARGE_ROUND) * LARGE_ROUND
        self.reserved += whole
        self._segments += 1
        return Block(whole, self._segments, 0, small)
