"""What an engine tells of its prefix cache and its work is what there is, whoever asks when."""

from __future__ import annotations

import pytest

from pagegraph.runtime.engine.cache_watch import CacheWatch
from pagegraph.runtime.ipc.protocol import CacheChanged, Member, SamplingParams, SubmitGroup, WatchCache
from pagegraph.runtime.ipc.routing import Engine
from tests.runtime.engine.test_engine import Harness


class Watched(Harness):
    """An engine, and what each of its watchers has learnt."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.learnt: dict[bytes, Engine] = {}
        self.gone: set[bytes] = set()
        self.count = 0
        self.engine._cache_watch = CacheWatch(self.scheduler, self.told)

    def told(self, client: bytes, message: CacheChanged) -> bool:
        self.count += 1
        if client not in self.gone:
            self.learnt.setdefault(client, Engine()).learn(message)
        return client not in self.gone

    def watch(self, client: bytes) -> None:
        self.mailbox.inbox.append((client, WatchCache()))

    def ask(self, name: str, prompt: list[int], max_tokens: int = 3) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.mailbox.put(SubmitGroup(prompts=[prompt], members=[Member(name, 0, params)]))

    def check(self, client: bytes) -> None:
        """A turn lasts a second, so all is told at its end."""
        scheduler, found = self.scheduler, self.learnt[client]
        assert found.stored == set(scheduler.block_tables.pool.cached)
        assert found.num_requests == scheduler.num_running + scheduler.num_waiting


@pytest.mark.parametrize("caching", [True, False])
def test_watchers_know_what_is_cached_through_evictions_and_restarts(caching: bool) -> None:
    harness = Watched(num_blocks=24, max_num_seqs=2, max_queue=50, caching=caching)
    harness.watch(b"early")
    for number in range(12):
        harness.ask(f"{number}", [number % 5 + 1, *[1, 2, 3, 4] * 6], max_tokens=6)
        for _ in range(2):  # what comes right after a message waits for the next one
            harness.turn()
        harness.check(b"early")
        if number == 6:
            harness.watch(b"late")
        if number == 8:
            harness.scheduler.restart()
    harness.run()
    harness.turn()
    for client in (b"early", b"late"):
        harness.check(client)
    assert bool(harness.learnt[b"late"].stored) == caching
    assert (harness.scheduler.block_tables.pool.evictions > 0) == caching


def test_tokens_of_prompts_that_are_to_be_computed() -> None:
    harness = Watched(max_num_seqs=1, budget=8)
    harness.watch(b"w")
    harness.ask("a", [1, 2, 3, 4, 5] * 6)
    harness.ask("b", [5, 4, 3, 2, 1] * 2)
    harness.turn()
    found = harness.learnt[b"w"]
    assert (found.num_requests, found.num_prompt_tokens) == (2, 30 - 8 + 10)
    harness.run()
    harness.turn()
    assert (found.num_requests, found.num_prompt_tokens) == (0, 0)


def test_who_is_gone_is_told_no_more_and_nothing_is_kept_for_nobody() -> None:
    harness = Watched()
    harness.ask("a", [1, 2, 3, 4] * 5)
    harness.run()
    assert harness.scheduler.block_tables.pool.changes is None and harness.count == 0
    harness.watch(b"w")
    harness.turn()
    harness.gone.add(b"w")
    harness.ask("b", [2, 3, 4] * 5)
    harness.run()
    told = harness.count
    harness.ask("c", [3, 4, 5] * 5)
    harness.run()
    assert harness.count == told and harness.scheduler.block_tables.pool.changes is None
