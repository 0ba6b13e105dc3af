"""The queue in order, and the prompt tokens in it."""

from __future__ import annotations

from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.waiting import Waiting


def prompt(name: str, length: int, arrival: float) -> Sequence:
    return Sequence(name, [1] * length, SamplingParams(), frozenset(), 0, 100, arrival=arrival)


def test_in_order_whoever_joins_and_leaves_and_tokens_are_those_of_who_waits() -> None:
    a, b, c = prompt("a", 10, 1.0), prompt("b", 20, 2.0), prompt("c", 40, 3.0)
    waiting = Waiting([b])
    waiting.join(c)
    waiting.join(a)
    assert list(waiting) == [a, b, c] and waiting.first(2) == [a, b] and len(waiting) == 3
    assert waiting.num_tokens == 70
    waiting.leave(b)
    assert list(waiting) == [a, c] and waiting.num_tokens == 50
