"""The client against a scripted server: every request once, at most so many at once, conversations in their order."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import pytest

from pagegraph.runtime.bench.arrivals import arrival_times
from pagegraph.runtime.bench.client import Plan, run
from pagegraph.runtime.bench.stream import Target
from pagegraph.runtime.bench.work import Request, Shape, made_up
from tests.runtime.bench.fake_server import FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def plan(server: FakeServer, requests: Sequence[Request], path: str = "/v1/completions", **changed) -> Plan:
    times = changed.pop("times", [0.0] * len(requests))
    return Plan(Target(server.url + path), "fake", requests, times, **changed)


@pytest.mark.parametrize("processes", [1, 3])
def test_every_request_is_sent_once_and_answered_in_order(server: FakeServer, processes: int) -> None:
    requests = [Request([5] * (index + 1), 2 + index % 3) for index in range(12)]
    ticks: list[int] = []
    sent = run(plan(server, requests, fields={"temperature": 0}), processes, lambda: ticks.append(1))
    assert [one.error for one in sent.outcomes] == [""] * 12 and len(ticks) == 12
    assert [one.prompt_len for one in sent.outcomes] == list(range(1, 13))
    assert [one.output_tokens for one in sent.outcomes] == [one.output_len for one in requests]
    assert sorted(len(body["prompt"]) for body in server.bodies) == list(range(1, 13))
    assert all(body["temperature"] == 0 and body["stream"] and body["model"] == "fake" for body in server.bodies)
    assert sent.duration >= max(one.latency for one in sent.outcomes) and sent.busy > 0


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_at_most_so_many_at_once(server: FakeServer, processes: int) -> None:
    server.gap = 0.01
    sent = run(plan(server, [Request("a b", 3)] * 12, max_concurrency=3), processes)
    assert all(one.success for one in sent.outcomes)
    spans = sorted((one.start_time, one.start_time + one.latency) for one in sent.outcomes)
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= 3
    assert sum(one.queue_time > 0.02 for one in sent.outcomes) >= 6  # those behind the first three waited


def test_nothing_is_sent_before_its_time(server: FakeServer) -> None:
    times, before = arrival_times(6, 40.0, seed=1), time.perf_counter()
    sent = run(plan(server, [Request("a", 1)] * 6, times=times))
    assert sent.duration >= times[-1] - 1e-3
    assert all(one.start_time >= before + at - 1e-3 for one, at in zip(sent.outcomes, times, strict=True))


def test_what_the_server_takes_is_in_the_times(server: FakeServer) -> None:
    server.gap = 0.02
    (one,) = run(plan(server, [Request("a", 5)])).outcomes
    assert one.ttft >= 0.02 and len(one.itl) == 4 and one.latency >= 0.1 - 1e-3
    assert one.latency == pytest.approx(one.ttft + sum(one.itl)) and one.tpot == pytest.approx(sum(one.itl) / 4)


def test_a_failure_is_its_requests_own(server: FakeServer) -> None:
    server.fails = lambda body: body["max_tokens"] == 2
    sent = run(plan(server, [Request("a", 1), Request("a", 2), Request("a", 3)]))
    assert [one.success for one in sent.outcomes] == [True, False, True] and "HTTP 500" in sent.outcomes[1].error


def test_without_a_usage_events_and_what_was_meant_count(server: FakeServer) -> None:
    server.usage = False
    (one,) = run(plan(server, [Request("a b c", 4, input_len=3)])).outcomes
    assert (one.has_usage, one.prompt_len, one.output_tokens) == (False, 3, 4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_turn_has_the_answers_before_it(server: FakeServer, processes: int) -> None:
    requests = made_up(6, Shape(input_len=3, output_len=2, num_turns=3), vocab_size=None)
    sent = run(plan(server, requests, "/v1/chat/completions"), processes)
    assert [one.error for one in sent.outcomes] == [""] * 6
    firsts = [body["messages"] for body in server.bodies if len(body["messages"]) == 1]
    thirds = [body["messages"] for body in server.bodies if len(body["messages"]) == 5]
    assert len(firsts) == len(thirds) == 2
    assert [message["role"] for message in thirds[0]] == ["user", "assistant", "user", "assistant", "user"]
    assert thirds[0][1]["content"] == thirds[0][3]["content"] == " w0 w1"
    assert {third[0]["content"] for third in thirds} == {first[0]["content"] for first in firsts}
    server.bodies.clear()
    run(plan(server, requests), processes)  # as completions: one growing text
    longest = max((body["prompt"] for body in server.bodies), key=len)
    assert longest.count(" w0 w1") == 2 and len(longest.split()) == 3 * 3 + 2 * 2


def test_turns_behind_a_failed_one_fail(server: FakeServer) -> None:
    server.fails = lambda body: True
    sent = run(plan(server, made_up(2, Shape(input_len=3, output_len=2, num_turns=2), vocab_size=None)))
    assert "HTTP 500" in sent.outcomes[0].error and "turn before it failed" in sent.outcomes[1].error
    assert len(server.bodies) == 1


def test_a_request_that_takes_too_long_fails(server: FakeServer) -> None:
    server.gap = 0.2
    (one,) = run(plan(server, [Request("a", 50)], timeout=0.5)).outcomes
    assert "no whole answer within 0.5 s" in one.error and one.latency < 5 and math.isfinite(one.ttft)


@pytest.mark.parametrize("processes", [1, 2])
def test_conversations_of_ids_are_refused(server: FakeServer, processes: int) -> None:
    requests = made_up(4, Shape(input_len=3, output_len=2, num_turns=2), vocab_size=50)
    with pytest.raises((TypeError, RuntimeError), match="is text, no token ids"):
        run(plan(server, requests), processes)
