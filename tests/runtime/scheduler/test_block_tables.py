"""Pages of single sequences, by hand; the scheduler's fuzz checks them after every step of random work."""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.block_tables import Pages
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.slots import Rows

BLOCK = 4


def pages_of(num_blocks: int = 10) -> Pages:
    return Pages(BlockPool(num_blocks, BLOCK), Rows(2, 40, BLOCK))


def sequence_of(length: int) -> Sequence:
    return Sequence("a", list(range(length)), SamplingParams(), frozenset(), 0, 40)


def entered(pages: Pages, length: int) -> Sequence:
    """A sequence in a row, its prompt computed."""
    sequence = sequence_of(length)
    found = pages.find(sequence)
    pages.rows.enter(sequence, pages.claim(sequence, found, 0), BLOCK * len(found))
    pages.rows.computed[sequence.row] = length
    return sequence


@pytest.mark.parametrize(("spare", "given"), [(0, True), (5, True), (6, False)])
def test_rows_get_the_pages_they_lack_or_none(spare: int, given: bool) -> None:
    pages = pages_of()
    sequence = entered(pages, 6)
    rows = np.array([sequence.row], np.int32)
    assert pages.extend(rows, np.array([16], np.int32), spare) == given
    assert len(pages.rows.blocks_of(sequence.row)) == (4 if given else 2)
    assert pages.extend(rows, np.array([8], np.int32), spare=99), "what is there needs no spare pages"
    pages.check_integrity([sequence])


def test_what_was_released_is_found_but_never_the_whole_prompt() -> None:
    pages = pages_of()
    first = entered(pages, 8)
    blocks = pages.rows.blocks_of(first.row)
    pages.release(first)
    pages.check_integrity([])
    assert (pages.find(sequence_of(8)), pages.find(sequence_of(9))) == (blocks[:1], blocks)


@pytest.mark.parametrize(("spare", "given"), [(6, True), (7, False)])
def test_found_pages_that_nobody_holds_use_up_free_ones(spare: int, given: bool) -> None:
    pages = pages_of()
    pages.release(entered(pages, 8))
    sequence = sequence_of(9)
    found = pages.find(sequence)
    claimed = pages.claim(sequence, found, spare)
    assert (claimed is not None) == given and pages.pool.num_free == (6 if given else 9)
    if given:
        assert claimed[:2] == found and sequence.num_registered == 2


def test_pages_are_published_as_far_as_they_are_full_of_known_tokens() -> None:
    pages = pages_of()
    sequence = entered(pages, 9)
    pages.rows.known[sequence.row] = 7
    pages.publish(sequence)
    assert len(pages.find(sequence_of(9))) == 1
    pages.rows.known[sequence.row] = 9
    pages.publish(sequence)
    assert len(pages.find(sequence_of(9))) == 2
    pages.check_integrity([sequence])
