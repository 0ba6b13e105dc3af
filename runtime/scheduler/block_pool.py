"""The block pool: blocks of the KV cache, shared by content, evicted least recently used first.

Every block is exactly one of: null (block 0: padding, never handed out), free, or referenced. Free blocks
form an intrusive doubly linked list: taking, returning and pulling one out of the middle are O(1). A free
block keeps its hash until it is taken for something else. Knows no sequences, no tensors and no time.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pagegraph.runtime.scheduler.block_hashes import BlockHashes, new_key

NULL_BLOCK = 0
_NO_HASH = b""


class OutOfBlocks(Exception):
    """Fewer free blocks than asked for; the caller checks `num_free` first."""


@dataclass(slots=True)
class CacheChanges:
    """What became of the cache since somebody looked: by hash, whether it is there now. `cleared`: nothing else is."""

    cleared: bool = False
    present: dict[bytes, bool] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.cleared or bool(self.present)


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 included. `key`: of its hashes; None: one of its own.

    `changes`: kept from when one is put there.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool = True, key: bytes | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks {num_blocks}: at least 2 are needed, block 0 being the null block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.evictions = 0
        self.changes: CacheChanges | None = None
        self._hashes = BlockHashes(block_size, new_key() if key is None else key)
        self.clear()

    def clear(self) -> None:
        """All blocks are free and none is cached, whatever was."""
        self.num_free = self.num_blocks - 1
        self._references = array("q", [0]) * self.num_blocks
        self._hash = [_NO_HASH] * self.num_blocks
        self._cached: dict[bytes, int] = {}
        if self.changes is not None:
            self.changes = CacheChanges(cleared=True)
        self._evicted: OrderedDict[bytes, None] = (
            OrderedDict()
        )  # hashes of the last evictions, as many as there are blocks
        # Links of the free list; index `self.num_blocks` is its end: next(end) is the front, previous(end) the back.
        end = self.num_blocks
        self._next = array("q", [*range(1, self.num_blocks + 1), 1])
        self._previous = array("q", [*range(-1, self.num_blocks - 1), self.num_blocks - 1])
        self._previous[1] = end
        self._end = end

    @property
    def capacity(self) -> int:
        """Tokens that the blocks hold, the null block left out."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def usage(self) -> float:
        """Share of blocks that sequences hold, 0 to 1."""
        return 1 - self.num_free / (self.num_blocks - 1)

    @property
    def cached(self) -> list[bytes]:
        """Hashes of all that the cache holds."""
        return list(self._cached)

    def root_hash(self, salt: str = "") -> bytes:
        """Parent of a sequence's first block; a `salt` separates whoever must not share blocks."""
        return self._hashes.root(salt)

    def hash_blocks(self, parent: bytes, tokens: Sequence[int] | np.ndarray) -> list[bytes]:
        """Hashes of full blocks of token ids, the first of which follows the block, or root, of hash `parent`."""
        return self._hashes.chain(parent, np.asarray(tokens, np.int32).tobytes())

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a hash chain, not yet referenced."""
        found: list[int] = []
        for digest in hashes:
            block = self._cached.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody references: taking them uses up free blocks."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Reference cached blocks, pulling free ones off the free list."""
        references = self._references
        for block in blocks:
            if references[block] == 0:
                self._unlink(block)
            references[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks for new content, least recently used first; their old content is forgotten.

        Raises OutOfBlocks, taking none, if fewer are free.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free")
        taken = []
        for _ in range(count):
            block = self._next[self._end]
            self._unlink(block)
            if self._hash[block]:
                self._evict(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each, the last first: a prefix outlives its continuations in the cache."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                # What can be hit again goes to the back; what cannot is reused first.
                self._link(block, at_back=bool(self._hash[block]))

    def register(self, block: int, digest: bytes) -> None:
        """Make a full, referenced block findable; if equal content is already cached, that one stays."""
        if self.enable_caching and digest not in self._cached and not self._hash[block]:
            self._cached[digest] = block
            self._evicted.pop(digest, None)
            self._hash[block] = digest
            if self.changes is not None:
                self.changes.present[digest] = True

    def was_evicted(self, digest: bytes) -> bool:
        """Whether such content was cached, as far as is remembered, and gave way to other."""
        return digest in self._evicted

    def hash_of(self, block: int) -> bytes:
        """Hash under which the cache knows `block`, b"" if it does not."""
        return self._hash[block]

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless the blocks are exactly those of `tables`, the free list, and null."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        require(held[NULL_BLOCK] == 0 and self._references[NULL_BLOCK] == 0, "the null block is referenced")
        free = self._walk()
        require(len(free) == self.num_free == len(set(free)), "the free list and its count differ")
        for block in range(1, self.num_blocks):
            require(held[block] == self._references[block], f"block {block}: references and tables differ")
        require(
            {b for b in range(1, self.num_blocks) if not held[b]} == set(free), "free blocks are not those unreferenced"
        )
        for digest, block in self._cached.items():
            require(self._hash[block] == digest, f"block {block}: the cache points to other content")
        require(sum(map(bool, self._hash)) == len(self._cached), "a hash is not in the cache")

    def _walk(self) -> list[int]:
        free, block, before = [], self._next[self._end], self._end
        while block != self._end and len(free) <= self.num_blocks:
            require(self._previous[block] == before, f"block {block}: broken link")
            free.append(block)
            before, block = block, self._next[block]
        return free

    def _evict(self, block: int) -> None:
        digest, self._hash[block] = self._hash[block], _NO_HASH
        del self._cached[digest]
        if self.changes is not None:
            self.changes.present[digest] = False
        self._evicted[digest] = None
        if len(self._evicted) > self.num_blocks:
            self._evicted.popitem(last=False)
        self.evictions += 1

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1

    def _link(self, block: int, at_back: bool) -> None:
        before = self._previous[self._end] if at_back else self._end
        after = self._next[before]
        self._previous[block], self._next[block] = before, after
        self._next[before] = self._previous[after] = block
        self.num_free += 1


def require(holds: bool, what: str) -> None:
    """An assertion that stays where Python drops its own."""
    if not holds:
        raise AssertionError(what)
