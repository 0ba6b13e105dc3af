"""The line of the log that says what the engine does."""

from __future__ import annotations

import logging

import pytest

from pagegraph.runtime.engine.metrics import Counts
from pagegraph.runtime.engine.status_line import StatusLine
from pagegraph.runtime.ipc.protocol import SamplingParams, Submit
from pagegraph.runtime.scheduler.counters import Counters
from pagegraph.runtime.server.logs import FIELDS
from tests.runtime.engine.test_engine import Harness


def counts(**scheduled: int) -> Counts:
    return Counts(num_running=3, num_waiting=2, kv_cache_usage=0.125, scheduled=Counters(**scheduled))


def test_a_line_is_of_the_time_since_the_one_before_and_none_comes_while_idle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = counts(prompt_tokens=50, generated_tokens=7)
    line = StatusLine(10.0, lambda: now)
    line.look(100.0, idle=True)
    line.look(1000.0, idle=False)  # the rates do not begin before the work does
    now = counts(prompt_tokens=250, cached_tokens=80, generated_tokens=107, prefix_queries=160, prefix_hits=40)
    line.look(1009.9, idle=False)
    assert not caplog.records
    line.look(1010.0, idle=False)
    now = counts(prompt_tokens=250, cached_tokens=80, generated_tokens=207, prefix_queries=160, prefix_hits=40)
    line.look(1015.0, idle=True)
    line.look(1020.0, idle=True)
    for later in range(1021, 1100):
        line.look(later, idle=True)
    first, second = caplog.messages
    assert first == (
        "Avg prompt throughput: 12.0 tokens/s, Avg generation throughput: 10.0 tokens/s, Running: 3 reqs, Waiting: 2 reqs,"
        " KV cache usage: 12.5%, Prefix cache hit rate: 25.0%"
    )
    assert "prompt throughput: 0.0 tokens/s, Avg generation throughput: 10.0" in second and "none asked" in second
    assert getattr(caplog.records[0], FIELDS)["prefix_cache_hit_rate"] == 25.0


def test_never(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line = StatusLine(0.0, counts)
    for now in range(100):
        line.look(now, idle=False)
    assert not caplog.records


def test_an_engine_writes_it_while_it_has_work(caplog: pytest.LogCaptureFixture) -> None:
    """A turn lasts a second."""
    caplog.set_level(logging.INFO)
    harness = Harness()
    harness.engine.stats.status_line = StatusLine(5.0, harness.engine.stats.counts)
    harness.mailbox.put(
        Submit(request_id="one", token_ids=[1, 2, 3, 4], params=SamplingParams(max_tokens=12, ignore_eos=True))
    )
    for _ in range(60):
        harness.turn()
    lines = [message for message in caplog.messages if "Avg generation throughput" in message]
    assert len(lines) == 3 and "Running: 1 reqs" in lines[0] and "Running: 0 reqs" in lines[2]
