"""The running set: its order, and columns that are made anew only when it changes."""

from __future__ import annotations

from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.running import Running
from pagegraph.runtime.scheduler.sequence import Sequence


def joined(running: Running, batch: InputBatch, name: str, priority: int, asker: str = "") -> Sequence:
    sequence = Sequence(name, [1, 2], SamplingParams(), frozenset(), 0, 40, priority, asker=asker)
    batch.enter(sequence, [], 0)
    running.join(sequence)
    return sequence


def test_the_last_in_order_is_the_first_to_give_way() -> None:
    batch = InputBatch(3, 40, 4)
    running = Running(batch)
    low, high, middle = (joined(running, batch, str(priority), priority) for priority in (5, -1, 2))
    assert list(running) == [high, middle, low] and running.last is low and len(running) == 3
    assert running.fixed().request_ids.tolist() == ["-1", "2", "5"]


def test_the_asker_with_the_most_gives_way_and_the_first_of_all_never_before_others() -> None:
    batch = InputBatch(5, 40, 4)
    running = Running(batch)
    order = [joined(running, batch, f"{place}", place, asker) for place, asker in enumerate("abaab")]
    given_up = []
    while len(running):
        given_up.append(running.last)
        running.leave(running.last)
    assert given_up == [order[place] for place in (3, 4, 2, 1, 0)]


def test_columns_are_made_anew_when_somebody_joins_or_leaves() -> None:
    batch = InputBatch(2, 40, 4)
    running = Running(batch)
    first = joined(running, batch, "a", 0)
    kept = running.fixed()
    assert running.fixed() is kept and running.fixed_of(kept.slots) is kept
    assert running.fixed_of(kept.slots.copy()) is not kept
    joined(running, batch, "b", 1)
    assert running.fixed_of(kept.slots) is not kept, "the plan is of other sequences"
    assert running.fixed().slots.tolist() == [0, 1] and len(running.ones) == len(running.trues) == 2
    running.leave(first)
    assert running.fixed().slots.tolist() == [1] and running.trues.tolist() == [True]
