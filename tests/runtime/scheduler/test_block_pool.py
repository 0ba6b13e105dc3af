"""The block pool against a list: same blocks handed out, same hits, same evictions, under random use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagegraph.runtime.scheduler.block_pool import NULL_BLOCK, BlockPool, OutOfBlocks

NUM_BLOCKS = 9
SIZE = 2


class PoolMachine(RuleBasedStateMachine):
    """The model keeps the free blocks in a list, front first, and the cache in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.free = list(range(1, NUM_BLOCKS))
        self.tables: list[list[int]] = []
        self.chains: list[list[bytes]] = []  # hashes of each table's registered blocks
        self.cache: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.evictions = 0

    def references(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @rule(count=st.integers(0, 5), content=st.lists(st.integers(0, 1), min_size=5, max_size=5), full=st.integers(0, 5))
    def start(self, count: int, content: list[int], full: int) -> None:
        """A sequence shares its cached prefix, takes the rest and registers what is full."""
        chain, parent = [], self.pool.root_hash()
        for token in content[:count]:
            (parent,) = self.pool.hash_blocks(parent, [token, token])
            chain.append(parent)
        hits = self.pool.lookup(chain)
        expected = []
        for digest in chain:
            if digest not in self.cache:
                break
            expected.append(self.cache[digest])
        assert hits == expected
        missing = count - len(hits)
        assert self.pool.num_free_among(hits) == sum(block in self.free for block in hits)
        if missing > len(self.free) - sum(block in self.free for block in hits):
            return
        self.pool.share(hits)
        self.free = [block for block in self.free if block not in hits]
        taken = self.pool.take(missing)
        assert taken == self.free[:missing], "not the least recently used blocks"
        self.free = self.free[missing:]
        for block in taken:
            if block in self.hash_of:
                del self.cache[self.hash_of.pop(block)]
                self.evictions += 1
        table = hits + taken
        for block, digest in list(zip(table, chain))[:full]:
            self.pool.register(block, digest)
            if digest not in self.cache and block not in self.hash_of:
                self.cache[digest], self.hash_of[block] = block, digest
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            if not self.references(block):
                self.free.insert(len(self.free) if block in self.hash_of else 0, block)

    @rule()
    def take_too_many(self) -> None:
        with pytest.raises(OutOfBlocks):
            self.pool.take(len(self.free) + 1)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.free = list(range(1, NUM_BLOCKS))
        self.tables.clear()
        self.cache.clear()
        self.hash_of.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.tables)
        assert (self.pool.num_free, self.pool.evictions) == (len(self.free), self.evictions)
        assert {b: self.pool.hash_of(b) for b in range(NUM_BLOCKS) if self.pool.hash_of(b)} == self.hash_of


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_the_pool_agrees_with_a_list = PoolMachine.TestCase


def chain_of(pool: BlockPool, tokens: list[int], salt: str = "") -> list[bytes]:
    return pool.hash_blocks(pool.root_hash(salt), tokens)


def test_a_hash_depends_on_everything_before_it_and_on_the_salt() -> None:
    pool = BlockPool(4, SIZE)
    base = chain_of(pool, [1, 2, 3, 4])
    assert chain_of(pool, [1, 2, 3, 4]) == base
    assert chain_of(pool, [1, 2, 3, 5])[0] == base[0] and chain_of(pool, [1, 2, 3, 5])[1] != base[1]
    assert not set(chain_of(pool, [9, 2, 3, 4])) & set(base)
    assert not set(chain_of(pool, [1, 2, 3, 4], "salt")) & set(base)
    assert base[0] != chain_of(pool, [3, 4])[0]
    assert pool.hash_blocks(base[0], [3, 4]) == base[1:] and pool.hash_blocks(base[0], []) == []


def test_hashes_of_two_pools_differ() -> None:
    assert chain_of(BlockPool(4, SIZE), [1, 2]) != chain_of(BlockPool(4, SIZE), [1, 2])


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(4, SIZE)
    table, chain = pool.take(3), chain_of(pool, [1, 2, 3, 4, 5, 6])
    for block, digest in zip(table, chain):
        pool.register(block, digest)
    pool.release(table)
    assert pool.take(1) == table[2:]
    assert pool.lookup(chain) == table[:2] and pool.evictions == 1


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(4, SIZE)
    assert NULL_BLOCK not in pool.take(3) and pool.num_free == 0 and pool.usage == 1


def test_nothing_is_cached_with_caching_off() -> None:
    pool = BlockPool(4, SIZE, enable_caching=False)
    chain = chain_of(pool, [1, 2])
    pool.register(pool.take(1)[0], chain[0])
    assert pool.lookup(chain) == []


@pytest.mark.parametrize("tables", [[[1]], [[1, 2], [2]], [[0, 1, 2]], []])
def test_integrity_notices_tables_that_differ_from_references(tables: list[list[int]]) -> None:
    pool = BlockPool(4, SIZE)
    pool.take(2)
    pool.check_integrity([[1, 2]])
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)


def test_a_pool_without_room_beside_the_null_block_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks 1"):
        BlockPool(1, SIZE)
