"""The scheduler and the block pool under random work, with a step that computes tokens from paged memory."""

from __future__ import annotations

import zlib
from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagegraph.compiler.step.inputs import StepOutput
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.chunk_limit import ChunkLimit
from pagegraph.runtime.scheduler.pack import Packer
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.step_time import StepLoad, StepTime
from tests.runtime.fake_step import BLOCK, EOS, MAX_LEN, VOCAB, FakeStep, check_outputs

prompts = st.builds(
    lambda shared, own: ([1, 2, 3, 4, 5, 6, 8, 9, 10, 0, 1, 2] * 2)[:shared] + own,
    st.integers(0, 24),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
)
works = st.lists(
    st.tuples(prompts, st.integers(1, 14), st.integers(0, 2), st.integers(0, 1), st.integers(0, 6)),
    min_size=1,
    max_size=9,
)
total_steps = 0


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    work=works,
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 48),
    caching=st.booleans(),
    depth=st.integers(0, 1),
    target_ms=st.sampled_from(["none", None, 10.0]),
    aborts=st.dictionaries(st.integers(0, 8), st.integers(0, 20), max_size=2),
    askers=st.sampled_from(["", "ab", "aab", "abc"]),
)
def test_random_work_gives_every_sequence_its_own_tokens(
    work, spare_blocks, max_num_seqs, budget, caching, depth, target_ms, aborts, askers
) -> None:
    global total_steps
    num_blocks = MAX_LEN // BLOCK + 1 + spare_blocks
    pool = BlockPool(num_blocks, BLOCK, caching)
    limit = None if target_ms == "none" else ChunkLimit(StepTime(), target_ms, least=BLOCK)
    scheduler = Scheduler(
        pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=MAX_LEN, chunk_limit=limit
    )
    step = FakeStep(num_blocks, max_num_seqs)
    sequences: dict[str, Sequence] = {}
    got: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    arrivals = deque(sorted(enumerate(work), key=lambda item: item[1][4]))
    launched: deque = deque()
    turn = 0
    while arrivals or scheduler.has_work or launched:
        while arrivals and arrivals[0][1][4] <= turn:
            index, (prompt, max_tokens, priority, seed, _) = arrivals.popleft()
            params = SamplingParams(max_tokens=max_tokens, min_tokens=seed, ignore_eos=index % 3 == 0)
            sequence = Sequence(
                str(index), list(prompt), params, frozenset([EOS]), seed, MAX_LEN, priority, float(turn),
                asker=askers[index % len(askers)] if askers else "",
            )  # fmt: skip
            sequences[str(index)] = sequence
            got[str(index)] = []
            scheduler.add(sequence)
        for index, at in aborts.items():
            if at == turn and scheduler.abort((0, str(index))):
                ended[str(index)] = "abort"
        scheduler.check_integrity()
        plan = scheduler.schedule()
        scheduler.check_integrity()
        if plan:
            assert plan.num_tokens <= budget
            launched.append((plan, step.run(Packer(scheduler.batch).pack(plan))))
            if limit:
                limit.step_time.observe(StepLoad.of(plan), 1.0 + plan.num_tokens)
        while launched and (len(launched) > depth or not plan):
            result = scheduler.commit(*launched.popleft())
            for request_id, token in zip(result.request_ids, result.token_ids.tolist(), strict=True):
                got[request_id].append(token)
            for sequence in result.ended:
                assert sequence.request_id not in ended, "a sequence ended twice"
                ended[sequence.request_id] = sequence.finish_reason
            scheduler.finish(result)
            scheduler.check_integrity()
        turn += 1
        assert turn < 3000, "the scheduler makes no progress"
    total_steps += len(step.queries)
    assert pool.num_free == num_blocks - 1, "blocks are held by nobody"
    check_outputs(sequences, got, ended)


def test_the_fuzz_above_ran_enough_steps() -> None:
    if not total_steps:
        pytest.skip("the fuzz was not selected")
    assert total_steps >= 2000


def scheduler_of(num_blocks: int = 20, **overrides) -> Scheduler:
    settings = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=MAX_LEN)
    return Scheduler(BlockPool(num_blocks, BLOCK), **{**settings, **overrides})


def sequence_of(name: str, length: int, max_tokens: int = 4, **overrides) -> Sequence:
    tokens = [zlib.crc32(f"{name}{i}".encode()) % VOCAB for i in range(length)]
    return Sequence(name, tokens, SamplingParams(max_tokens=max_tokens), frozenset(), 0, MAX_LEN, **overrides)


def planned(scheduler: Scheduler, plan: Plan) -> list[tuple[str, int]]:
    return list(zip(scheduler.batch.request_ids[plan.slots], plan.counts.tolist()))


def test_running_sequences_come_before_waiting_ones() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=8)
    scheduler.add(sequence_of("a", 6))
    first = scheduler.schedule()
    scheduler.commit(first, StepOutput(np.zeros(1, np.int32)))
    scheduler.add(sequence_of("b", 20))
    plan = scheduler.schedule()
    assert planned(scheduler, plan) == [("a", 1), ("b", 7)]


def test_priority_orders_the_queue() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    scheduler.add(sequence_of("low", 6, priority=5))
    scheduler.add(sequence_of("high", 6, priority=-1, arrival=9.0))
    assert planned(scheduler, scheduler.schedule()) == [("high", 6)]


def test_whole_prompts_without_chunking() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=MAX_LEN, enable_chunked_prefill=False)
    scheduler.add(sequence_of("a", 30))
    scheduler.add(sequence_of("b", 20))
    assert planned(scheduler, scheduler.schedule()) == [("a", 30)]


def test_prefix_counters_count_tokens() -> None:
    scheduler = scheduler_of()
    for name in ("a", "b"):
        sequence = sequence_of("same", 18)
        sequence.request_id = name
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan.counts.tolist() == [18, 2], "the second sequence reads the blocks the first writes in the same step"
    assert (scheduler.counters.prefix_queries, scheduler.counters.prefix_hits) == (36, 16)


def test_a_salt_keeps_prefixes_apart() -> None:
    scheduler = scheduler_of()
    for name in ("a", "b"):
        sequence = sequence_of("same", 18, cache_salt=name)
        sequence.request_id = name
        scheduler.add(sequence)
    assert scheduler.schedule().counts.tolist() == [18, 18]


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="set max_model_len to at most 36"):
        scheduler_of(num_blocks=10)


def test_a_failed_step_leaves_no_blocks_and_no_cache() -> None:
    scheduler = scheduler_of()
    scheduler.add(sequence_of("a", 18))
    scheduler.schedule()
    assert [sequence.request_id for sequence in scheduler.restart()] == ["a"]
    scheduler.check_integrity()
    assert scheduler.schedule().counts.tolist() == [18]


def large(**overrides) -> Scheduler:
    settings = dict(max_num_seqs=40, max_num_batched_tokens=512, max_model_len=16_000)
    return Scheduler(BlockPool(2000, 16), **{**settings, **overrides})


def prompt_of(name: str, length: int, **overrides) -> Sequence:
    tokens = [zlib.crc32(f"{name}{i}".encode()) % 1000 for i in range(length)]
    return Sequence(name, tokens, SamplingParams(max_tokens=20), frozenset(), 0, 16_000, **overrides)


def turn(scheduler: Scheduler) -> dict[str, int]:
    """Tokens of the next step by sequence; what it samples is committed."""
    plan = scheduler.schedule()
    scheduler.check_integrity()
    scheduler.finish(scheduler.commit(plan, StepOutput(np.zeros(len(plan), np.int32))))
    return dict(planned(scheduler, plan))


def test_short_prompts_pass_a_long_one_that_runs() -> None:
    scheduler = large()
    scheduler.add(prompt_of("long", 8000))
    assert turn(scheduler) == {"long": 512}
    for name in "abc":
        scheduler.add(prompt_of(name, 1))
    assert turn(scheduler) == {"long": 509, "a": 1, "b": 1, "c": 1}
    scheduler.add(prompt_of("d", 100))
    assert turn(scheduler) == {"long": 409, "a": 1, "b": 1, "c": 1, "d": 100}


def test_short_prompts_pass_a_long_one_that_waits_and_those_behind_it() -> None:
    scheduler = large()
    for name, length in (
        ("first", 3000),
        ("second", 3000),
        ("short", 60),
        ("as long as the share", 68),
        ("too long", 1),
    ):
        scheduler.add(prompt_of(name, length))
    assert turn(scheduler) == {"first": 512 - 60 - 68 - 1, "short": 60, "as long as the share": 68, "too long": 1}


def test_a_prompt_is_as_long_as_what_the_cache_lacks_of_it() -> None:
    scheduler = large()
    scheduler.add(history := prompt_of("history", 400))
    turn(scheduler)
    scheduler.add(prompt_of("long", 8000))
    turn(scheduler)
    tokens = [*history.tokens, *range(5000)]
    scheduler.add(Sequence("again", tokens[:420], SamplingParams(), frozenset(), 0, 16_000))
    scheduler.add(Sequence("too much more", tokens, SamplingParams(), frozenset(), 0, 16_000))
    assert turn(scheduler) == {"history": 1, "long": 491, "again": 20}


def test_a_shorter_prompt_overtakes_in_parts() -> None:
    scheduler = large()
    scheduler.add(prompt_of("long", 2000))
    for name in ("short", "too long", "as short"):
        scheduler.add(prompt_of(name, 1200 if name == "too long" else 600))
    assert [turn(scheduler) for _ in range(5)] == [
        {"long": 256, "short": 256}, {"long": 256, "short": 256}, {"long": 256, "short": 88, "as short": 168},
        {"long": 256, "short": 1, "as short": 255}, {"long": 334, "short": 1, "as short": 177},
    ]  # fmt: skip


def test_equal_long_prompts_run_one_after_the_other() -> None:
    scheduler = large()
    for name in "abc":
        scheduler.add(prompt_of(name, 1200))
    assert [turn(scheduler) for _ in range(4)] == [
        {"a": 512}, {"a": 512}, {"a": 176, "b": 336}, {"a": 1, "b": 511}
    ]  # fmt: skip


def test_nothing_passes_a_prompt_that_lacks_blocks() -> None:
    scheduler = Scheduler(BlockPool(101, 16), max_num_seqs=8, max_num_batched_tokens=512, max_model_len=1600)

    def prompt(name: str, length: int) -> Sequence:
        return Sequence(name, list(range(length)), SamplingParams(max_tokens=99), frozenset(), 0, 1600, cache_salt=name)

    scheduler.add(prompt("a", 900))
    assert turn(scheduler) == {"a": 512}
    scheduler.add(prompt("lacks blocks", 1000))
    scheduler.add(prompt("short", 1))
    assert turn(scheduler) == {"a": 388}, (
        "the second has tokens to start with, but no blocks: nobody takes those it waits for"
    )


@given(
    work=st.lists(st.tuples(st.sampled_from([1, 3, 31, 32, 33, 200, 600]), st.integers(0, 8)), min_size=2, max_size=12),
    budget=st.sampled_from([40, 64, 127, 128]),
)
@settings(max_examples=25, deadline=None)
def test_a_long_prompt_always_gets_its_share_and_no_token_is_left(work, budget: int) -> None:
    scheduler = large(max_num_batched_tokens=budget)
    work = deque(sorted(enumerate(work), key=lambda item: item[1][1]))
    turns = 0
    while work or scheduler.has_work:
        while work and work[0][1][1] <= turns:
            index, (length, _) = work.popleft()
            scheduler.add(prompt_of(str(index), length, arrival=float(turns)))
        running = list(scheduler._running)
        before = {s.request_id: int(scheduler.batch.computed[s.slot]) for s in running}
        prompts = [s for s in running if before[s.request_id] < s.num_prompt]
        decodes = len(running) - len(prompts)
        got = turn(scheduler) if scheduler.has_work else {}
        unfinished = [s for s in prompts if before[s.request_id] + got.get(s.request_id, 0) < s.num_prompt]
        if unfinished:
            first = unfinished[0]
            ahead = sum(got.get(s.request_id, 0) for s in prompts[: prompts.index(first)])
            left = budget - decodes - ahead
            assert got.get(first.request_id, 0) >= left - left // 2
            assert sum(got.values()) == budget, "tokens are left while a prompt waits for them"
            overtaking = [s for s in unfinished[1:] if got.get(s.request_id, 0)]
            assert len(overtaking) <= 1, "two prompts overtake in parts at a time"
            for sequence in overtaking:
                wanted = [s.num_prompt - before[s.request_id] for s in (sequence, first)]
                assert 2 * wanted[0] <= wanted[1], "two long prompts at a time"
        turns += 1
        assert turns < 2000
