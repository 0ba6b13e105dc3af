"""Which states are kept, where chunks end for them, and in which order rows are copied."""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.scheduler import state_snapshots
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.state_snapshots import StateSnapshots

SIZE, FIRST = 8, 5  # tokens of a block, and the first row


@pytest.fixture(autouse=True)
def short_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_snapshots, "LEAST_TOKENS", 2 * SIZE)


def sequence(length: int, name: str = "a", slot: int = 0) -> Sequence:
    one = Sequence(name, np.arange(length), SamplingParams(), frozenset(), 0, 1000)
    one.prefix.hashes = [f"{name}{at}".encode() for at in range(length // SIZE)]
    one.slot = slot
    return one


def computed(snapshots: StateSnapshots, one: Sequence, cached: int = 0) -> list[int]:
    """Bring it to its end, in chunks that are as long as may be -> where they end."""
    at, ends = cached, []
    while at < len(one.tokens):
        at += snapshots.wanted(one, at, len(one.tokens) - at)
        snapshots.advanced(one, at)
        snapshots.begin_step()
        ends.append(at)
    return ends


def test_a_chunk_ends_at_the_last_border_of_a_prompt() -> None:
    snapshots = StateSnapshots(2, FIRST, SIZE)
    for length, ends in ((37, [32, 37]), (40, [32, 40]), (41, [40, 41]), (20, [16, 20]), (16, [16]), (7, [7])):
        one = sequence(length, str(length))
        assert snapshots.usable(one, []) == []
        assert computed(snapshots, one) == ends


def test_blocks_that_others_had_are_of_use_up_to_a_kept_state() -> None:
    snapshots, one = StateSnapshots(3, FIRST, SIZE), sequence(37, slot=2)
    snapshots.usable(one, [])
    computed(snapshots, one)
    [(source, row)] = snapshots.take_copies()
    assert source == 2 and FIRST <= row < FIRST + 3
    again = sequence(50, slot=1)
    assert snapshots.usable(again, [11, 12, 13, 14, 15]) == [11, 12, 13, 14]
    snapshots.entered(again, 32)
    assert snapshots.take_copies() == [(row, 1)]
    assert computed(snapshots, again, 32) == [40, 48, 50]  # where others had blocks, and its own last border


def test_the_least_recently_used_gives_way() -> None:
    snapshots = StateSnapshots(2, FIRST, SIZE)
    for name in "ab":
        one = sequence(20, name)
        snapshots.usable(one, [])
        computed(snapshots, one)
    old = sequence(20, "a")
    assert snapshots.usable(old, [3, 4]) == [3, 4]
    snapshots.entered(old, 16)
    new = sequence(20, "c")
    snapshots.usable(new, [])
    computed(snapshots, new)
    assert [len(snapshots.usable(sequence(20, name), [3, 4])) for name in "abc"] == [2, 0, 2]
    copies = snapshots.take_copies()
    assert copies[-2][0] == copies[0][1] and copies[-1][1] == copies[1][1]  # a's row is read, b's is written anew
    snapshots.clear()
    assert not len(snapshots) and not snapshots.take_copies()
