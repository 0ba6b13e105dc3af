"""The queue in order, and the prompt tokens in it."""

from __future__ import annotations

from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.sequence import Sequence, State
from pagegraph.runtime.scheduler.waiting import Waiting


def prompt(name: str, length: int, arrival: float, asker: str = "", priority: int = 0) -> Sequence:
    return Sequence(name, [1] * length, SamplingParams(), frozenset(), 0, 100, priority, arrival=arrival, asker=asker)


def test_in_order_whoever_joins_and_leaves_and_tokens_are_those_of_who_waits() -> None:
    a, b, c = prompt("a", 10, 1.0), prompt("b", 20, 2.0), prompt("c", 40, 3.0)
    waiting = Waiting({}, [b])
    waiting.join(c)
    waiting.join(a)
    assert waiting.lines == [[a, b, c]] and waiting.first(2) == [a, b] and len(waiting) == 3
    assert waiting.num_tokens == 70
    waiting.leave(b)
    assert waiting.lines == [[a, c]] and waiting.num_tokens == 50


def test_an_asker_of_one_is_next_behind_an_asker_of_a_thousand() -> None:
    running = {"many": 8}
    waiting = Waiting(running, [prompt(f"{number}", 1, number, "many") for number in range(1000)])
    one = prompt("one", 5, 2000.0, "one")
    waiting.join(one)
    assert [sequence.request_id for sequence in waiting.first(3)] == ["one", "0", "1"]
    assert waiting.of("one") == (1, 5) and waiting.of("many") == (1000, 1000) and waiting.of("none") == (0, 0)
    waiting.leave(one)
    assert waiting.of("one") == (0, 0) and waiting.first(1)[0].request_id == "0"


def test_askers_get_equal_shares_of_what_runs() -> None:
    """Also those that they get in the same step."""
    running = {"a": 3, "b": 1}
    waiting = Waiting(running, [prompt(f"{asker}{n}", 1, n, asker) for asker in "ab" for n in range(4)])
    assert [sequence.request_id for sequence in waiting.first(6)] == ["b0", "b1", "a0", "b2", "a1", "b3"]


def test_priorities_are_of_one_asker_and_whoever_has_begun_comes_first() -> None:
    urgent, begun, plain = (
        prompt("urgent", 1, 3.0, "a", -9),
        prompt("begun", 1, 2.0, "a", 5),
        prompt("plain", 1, 1.0, "a"),
    )
    other = prompt("other", 1, 9.0, "b", 7)
    begun.state = State.PREEMPTED
    assert Waiting({"a": 2}, [begun, other]).first(9) == [begun, other]
    assert Waiting({"a": 2}, [plain, urgent, other]).first(9) == [other, urgent, plain]
    assert Waiting({"a": 2, "b": 2}, [plain, urgent, other]).first(9) == [urgent, other, plain]


def test_first_is_a_beginning_of_all() -> None:
    waiting = Waiting({"a": 1}, [prompt(f"{n}", 1, n, "abc"[n % 7 % 3], n % 2) for n in range(40)])
    whole = waiting.first(100)
    assert len(set(whole)) == 40 == len(waiting)
    assert all(waiting.first(count) == whole[:count] for count in range(40))
