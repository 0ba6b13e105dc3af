"""Gives sequences their KV blocks: finds cached ones when a sequence starts, takes more as it grows, releases them.

Full blocks are published to the prefix cache. A block is full when all of its tokens are on the host and their keys and
values are computed or in a launched step: whoever reads it, a later step or a later sequence of the same step, reads it
after it is written. Draft tokens are not published. This file keeps each sequence's block hashes and how many of its
blocks are published. It knows no order among sequences: the scheduler decides who is preempted when blocks run out.

Blocks of the next eight tokens are taken at once while there are plenty, so that most decode steps bring no new block
and the device goes on from the metadata of the step before. Blocks are freed at once, even with a step in flight: a
device runs steps in order, so a block is read before it is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pagegraph.runtime.scheduler.block_pool import BlockPool, require
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.state_snapshots import StateSnapshots

CACHE_MISSES = {
    "new": "nothing like it was computed for this key and cache_salt, as far as is remembered",
    "evicted": "it was cached, and gave way to other prompts: the KV cache is small for the prompts that come again",
    "in_flight": "another request's prompt is the same that far and was still being computed",
    "no_state": "its blocks are cached, but the recurrent state behind them was not kept, or gave way to others",
    "skipped": "log-probabilities of the prompt, or an embedding of all of it, have to be computed",
    "disabled": "enable_prefix_caching is false",
}  # what stopped a hit before the end of the prompt: its name, and what that means


class BlockTables:
    """The block tables of `batch`, filled with blocks of `pool`."""

    def __init__(self, pool: BlockPool, batch: InputBatch, snapshots: StateSnapshots | None = None) -> None:
        """snapshots: of recurrent states, without which cached blocks are of no use; None: blocks are all there is."""
        self.pool = pool
        self.batch = batch
        self.snapshots = snapshots
        # Free blocks that new sequences, and blocks taken ahead of need, leave for running sequences to grow.
        self.watermark = max(1, pool.num_blocks // 100)

    def find(self, sequence: Sequence) -> list[int]:
        """Cached blocks of a waiting sequence's prefix; one token at least is left to compute."""
        if not self.pool.enable_caching or sequence.skip_reading_prefix_cache:
            return []
        full = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_hashes(sequence, sequence.tokens, full)
        blocks = self.pool.lookup(sequence.prefix.hashes[:full])
        return blocks if self.snapshots is None else self.snapshots.usable(sequence, blocks)

    def miss(self, sequence: Sequence, cached: int, running: Iterable[Sequence]) -> str:
        """Why no more than `cached` tokens of a sequence's prompt were found, a key of CACHE_MISSES; "": no more can be."""
        at = cached // self.pool.block_size
        if at == (len(sequence.tokens) - 1) // self.pool.block_size:
            return ""
        if not self.pool.enable_caching:
            return "disabled"
        if sequence.skip_reading_prefix_cache:
            return "skipped"
        missing = sequence.prefix.hashes[at]
        if any(missing in one.prefix.hashes[at : at + 1] for one in running):
            return "in_flight"
        if self.pool.lookup([missing]):
            return "no_state"
        return "evicted" if self.pool.was_evicted(missing) else "new"

    def claim(self, sequence: Sequence, found: list[int], spare: int) -> list[int] | None:
        """Blocks for all tokens of a waiting sequence, `found` the first; None, taking none, if less than `spare` were
        left.
        """
        needed = -(-len(sequence.tokens) // self.pool.block_size) - len(found)
        if needed + spare > self.pool.num_free - self.pool.num_free_among(found):
            return None
        self.pool.share(found)
        sequence.prefix.num_registered = len(found)
        return found + self.pool.take(needed)

    def extend(self, slots: np.ndarray, lengths: np.ndarray, spare: int = 0) -> bool:
        """Give the slots the blocks they lack to hold `lengths` tokens; False, giving none, if less than `spare` were
        left.
        """
        missing = np.maximum(-(-lengths // self.batch.block_size) - self.batch.num_blocks[slots], 0)
        if wanted := int(missing.sum()):
            if wanted + spare > self.pool.num_free:
                return False
            short = np.flatnonzero(missing)
            self.batch.add_blocks(slots[short], missing[short], self.pool.take(wanted))
        return True

    def publish(self, sequence: Sequence) -> None:
        """Publish the blocks of a running sequence that are full by now."""
        batch, slot = self.batch, sequence.slot
        full = min(int(batch.known[slot]), int(batch.computed[slot])) // self.pool.block_size
        if full <= sequence.prefix.num_registered or not self.pool.enable_caching:
            return
        self._extend_hashes(sequence, batch.tokens[slot], full)
        for block in range(sequence.prefix.num_registered, full):
            self.pool.register(int(batch.blocks[slot, block]), sequence.prefix.hashes[block])
        sequence.prefix.num_registered = full

    def release(self, sequence: Sequence) -> None:
        """Publish what is full of a sequence's blocks and give all of them back to the pool."""
        self.publish(sequence)
        self.pool.release(self.batch.take_blocks(sequence.slot))
        sequence.prefix.num_registered = 0

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the tables of the running hold all blocks in use, and what is published is in
        them.
        """
        self.pool.check_integrity([self.batch.blocks_of(sequence.slot) for sequence in running])
        for sequence in running:
            self._check(sequence)

    def _extend_hashes(self, sequence: Sequence, tokens: np.ndarray, num_blocks: int) -> None:
        size, hashes = self.pool.block_size, sequence.prefix.hashes
        if len(hashes) < num_blocks:
            parent = hashes[-1] if hashes else self.pool.root_hash(sequence.cache_salt)
            hashes += self.pool.hash_blocks(parent, tokens[len(hashes) * size : num_blocks * size])

    def _check(self, sequence: Sequence) -> None:
        batch, slot = self.batch, sequence.slot
        blocks = batch.blocks_of(slot)
        require(len(blocks) * batch.block_size >= batch.computed[slot], "tokens were computed without a block")
        require(not batch.blocks[slot, len(blocks) :].any(), "a block is listed beyond a table's end")
        require(
            sequence.prefix.num_registered * batch.block_size <= batch.computed[slot], "unwritten blocks are published"
        )
        for index, block in enumerate(blocks):
            published = self.pool.hash_of(block)
            rightly = index < sequence.prefix.num_registered and published == sequence.prefix.hashes[index]
            require(not published or rightly, f"block {block} is published as content that it does not hold")
