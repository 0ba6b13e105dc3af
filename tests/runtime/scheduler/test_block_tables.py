"""Blocks of single sequences, by hand; the scheduler's fuzz checks them after every step of random work."""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.block_tables import BlockTables
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.sequence import Sequence

BLOCK = 4


def tables_of(num_blocks: int = 10) -> BlockTables:
    return BlockTables(BlockPool(num_blocks, BLOCK), InputBatch(2, 40, BLOCK))


def sequence_of(length: int) -> Sequence:
    return Sequence("a", list(range(length)), SamplingParams(), frozenset(), 0, 40)


def entered(block_tables: BlockTables, length: int) -> Sequence:
    """A sequence in a slot, its prompt computed."""
    sequence = sequence_of(length)
    found = block_tables.find(sequence)
    block_tables.batch.enter(sequence, block_tables.claim(sequence, found, 0), BLOCK * len(found))
    block_tables.batch.computed[sequence.slot] = length
    return sequence


@pytest.mark.parametrize(("spare", "given"), [(0, True), (5, True), (6, False)])
def test_slots_get_the_blocks_they_lack_or_none(spare: int, given: bool) -> None:
    block_tables = tables_of()
    sequence = entered(block_tables, 6)
    slots = np.array([sequence.slot], np.int32)
    assert block_tables.extend(slots, np.array([16], np.int32), spare) == given
    assert len(block_tables.batch.blocks_of(sequence.slot)) == (4 if given else 2)
    assert block_tables.extend(slots, np.array([8], np.int32), spare=99), "what is there needs no spare blocks"
    block_tables.check_integrity([sequence])


def test_what_was_released_is_found_but_never_the_whole_prompt() -> None:
    block_tables = tables_of()
    first = entered(block_tables, 8)
    blocks = block_tables.batch.blocks_of(first.slot)
    block_tables.release(first)
    block_tables.check_integrity([])
    assert (block_tables.find(sequence_of(8)), block_tables.find(sequence_of(9))) == (blocks[:1], blocks)


@pytest.mark.parametrize(("spare", "given"), [(6, True), (7, False)])
def test_found_blocks_that_nobody_holds_use_up_free_ones(spare: int, given: bool) -> None:
    block_tables = tables_of()
    block_tables.release(entered(block_tables, 8))
    sequence = sequence_of(9)
    found = block_tables.find(sequence)
    claimed = block_tables.claim(sequence, found, spare)
    assert (claimed is not None) == given and block_tables.pool.num_free == (6 if given else 9)
    if given:
        assert claimed[:2] == found and sequence.prefix.num_registered == 2


def test_blocks_are_published_as_far_as_they_are_full_of_known_tokens() -> None:
    block_tables = tables_of()
    sequence = entered(block_tables, 9)
    block_tables.batch.known[sequence.slot] = 7
    block_tables.publish(sequence)
    assert len(block_tables.find(sequence_of(9))) == 1
    block_tables.batch.known[sequence.slot] = 9
    block_tables.publish(sequence)
    assert len(block_tables.find(sequence_of(9))) == 2
    block_tables.check_integrity([sequence])
