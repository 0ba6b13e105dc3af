"""Draft tokens in a step: arithmetic by hand, and random right and wrong draft tokens through the scheduler and paged memory."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagegraph.compiler.step.inputs import StepLogprobs, StepOutput
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens, ScheduledDrafts, Verification, as_queries, verify
from pagegraph.runtime.scheduler.pack import Packer
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.spec_decode.drafter import within
from tests.runtime.fake_step import BLOCK, EOS, MAX_LEN, VOCAB, FakeStep, check_outputs, next_token


def judged(
    sampled: list[int],
    draft_tokens: list[int],
    known: int = 5,
    max_len: int = 40,
    min_len: int = 0,
    stop_ids: tuple[int, ...] = (EOS,),
) -> Verification:
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    drafts = ScheduledDrafts(ints(0), ints(len(draft_tokens)), ints(0), np.zeros(len(sampled), bool), None)
    return verify(
        drafts,
        ints(*sampled),
        ints(*draft_tokens)[None],
        ints(known),
        ints(max_len),
        ints(min_len),
        ints(*stop_ids)[None],
    )


@pytest.mark.parametrize(
    ("sampled", "draft_tokens", "limits", "tokens", "accepted", "stopped"),
    [
        ([1, 2, 3], [1, 2], {}, [1, 2, 3], 2, False),
        ([1, 2, 3], [1, 5], {}, [1, 2], 1, False),
        ([1, 2, 3], [5, 2], {}, [1], 0, False),
        ([1, EOS, 3], [1, EOS], {}, [1, EOS], 2, True),
        ([1, EOS, 3], [1, EOS], dict(min_len=7), [1, EOS, 3], 2, False),
        ([1, EOS, 3], [1, EOS], dict(max_len=7), [1, EOS], 2, False),
        ([1, 2, EOS], [1, 2], {}, [1, 2, EOS], 2, True),
        ([1, 2, 3], [1, 2], dict(max_len=6), [1], 1, False),
        ([4, 4, 4], [4, 4], dict(stop_ids=(-1, 4)), [4], 1, True),
    ],
)
def test_what_is_accepted_and_where_it_ends(sampled, draft_tokens, limits, tokens, accepted, stopped) -> None:
    found = judged(sampled, draft_tokens, **limits)
    assert found.tokens[0, : found.lengths[0]].tolist() == tokens
    assert (int(found.accepted[0]), bool(found.stopped[0])) == (accepted, stopped)


@pytest.mark.parametrize(
    ("counts", "budget", "kept"),
    [
        ([3, 1, 2], 6, [3, 1, 2]),
        ([3, 1, 2], 5, [2, 1, 2]),
        ([3, 1, 2], 4, [2, 1, 1]),
        ([2, 2], 1, [1, 0]),
        ([2, 0], 0, [0, 0]),
    ],
)
def test_a_budget_goes_round(counts: list[int], budget: int, kept: list[int]) -> None:
    assert within(np.array(counts, np.int32), budget).tolist() == kept


@pytest.mark.parametrize(("of", "slots"), [([3], [2, 3, 3, 3]), ([3, 0], [2, 3, 3, 3]), ([0], None)])
def test_draft_tokens_are_queries_of_their_slots_in_the_plan(of: list[int], slots: list[int] | None) -> None:
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    columns = ints(2, 3), ints(7, 8), ints(5, 6), ints(4, 3), np.array([False, True])
    split, drafts = as_queries(columns, DraftTokens(ints(*of), ints(*[2] * len(of)), None))
    if slots is None:
        assert split is columns and drafts is None
    else:
        assert split[0].tolist() == slots and split[2].tolist() == [5, 6, 7, 8] and split[3].tolist() == [4, 1, 1, 1]
        assert (drafts.slots.tolist(), drafts.first.tolist(), drafts.others.tolist()) == (
            [3],
            [1],
            [True] + [False] * 3,
        )


prompts = st.builds(
    lambda shared, own: ([1, 2, 3, 4, 5, 6, 8, 9, 10, 0, 1, 2] * 2)[:shared] + own,
    st.integers(0, 24),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
)
works = st.lists(
    st.tuples(prompts, st.integers(6, 26), st.integers(0, 2), st.integers(0, 1), st.integers(0, 6)),
    min_size=2,
    max_size=7,
)
seen = {"steps": 0, "accepted": 0, "rejected": 0, "uncertain": 0}


class Oracle:
    """Draft tokens that are right with a given chance, on the host or, made by each step for the next, on the device."""

    def __init__(self, scheduler: Scheduler, most: int, chance: float, seed: int, on_device: bool) -> None:
        self.scheduler, self.most, self.chance, self.on_device = scheduler, most, chance, on_device
        self.rng = np.random.default_rng(seed)
        self.epochs: dict[int, int] = {}  # of the sequence that a slot's last sample was of, by slot

    def draft(self, history: list[int], seed: int) -> tuple[list[int], int]:
        history, known = list(history), len(history)
        for _ in range(self.most):
            right = next_token(history, seed)
            history.append(right if self.rng.random() < self.chance else int(self.rng.integers(VOCAB)))
        return history[known:], 1

    def propose(self) -> DraftTokens | None:
        slots, limits, budget = self.scheduler.room_for_drafts(self.most, lag=None if self.on_device else 0)
        counts = within(np.minimum(limits, self.rng.integers(0, self.most + 1, len(slots))).astype(np.int32), budget)
        drafting = counts > 0
        if self.on_device:  # it has made none for a slot that has not sampled yet
            drafting &= np.array(
                [self.epochs.get(slot) == self.scheduler.batch.epoch[slot] for slot in slots.tolist()], bool
            )
        if not drafting.any():
            return None
        if self.on_device:
            return DraftTokens(slots[drafting], counts[drafting], None)
        batch = self.scheduler.batch
        tokens = [
            self.draft(batch.tokens[slot, : batch.known[slot]].tolist(), int(batch.sampling.seed[slot]))[0]
            for slot in slots.tolist()
        ]
        return DraftTokens(slots[drafting], counts[drafting], np.array(tokens, np.int32)[drafting])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    work=works,
    spare_blocks=st.sampled_from([4, 2, 1, 0, 12]),
    max_num_seqs=st.integers(1, 5),
    spare_entries=st.integers(0, 24),
    budget=st.integers(5, 80),
    caching=st.booleans(),
    depth=st.integers(0, 1),
    most=st.sampled_from([4, 6, 2, 1]),
    chance=st.sampled_from([1.0, 0.9, 0.6, 0.0]),
    seed=st.integers(0, 1000),
    on_device=st.booleans(),
    aborts=st.dictionaries(st.integers(0, 6), st.integers(0, 20), max_size=2),
)
def test_draft_tokens_right_or_wrong_change_no_token(
    work, spare_blocks, max_num_seqs, spare_entries, budget, caching, depth, most, chance, seed, on_device, aborts
) -> None:
    num_blocks = MAX_LEN // BLOCK + 1 + spare_blocks
    pool = BlockPool(num_blocks, BLOCK, caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_LEN,
        max_decode_tokens=max_num_seqs + spare_entries,
    )
    packer, oracle = Packer(scheduler.batch), Oracle(scheduler, most, chance, seed, on_device)
    step = FakeStep(num_blocks, max_num_seqs, oracle.draft if on_device else None)
    sequences: dict[str, Sequence] = {}
    got: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    arrivals = deque(sorted(enumerate(work), key=lambda item: item[1][4]))
    launched: deque = deque()
    turn = 0

    def commit() -> None:
        result = scheduler.commit(*launched.popleft())
        tokens = {i: [token] for i, token in enumerate(result.token_ids.tolist())}
        tokens.update({i: delta.token_ids for i, delta in result.deltas.items()})
        for i, request_id in enumerate(result.request_ids):
            assert tokens[i][-1] == result.token_ids[i]
            got[request_id] += tokens[i]
        for sequence in result.ended:
            assert sequence.request_id not in ended, "a sequence ended twice"
            ended[sequence.request_id] = sequence.finish_reason
        scheduler.finish(result)
        scheduler.check_integrity()

    while arrivals or scheduler.has_work or launched:
        while arrivals and arrivals[0][1][4] <= turn:
            index, (prompt, max_tokens, priority, noise, _) = arrivals.popleft()
            params = SamplingParams(
                max_tokens=max_tokens,
                min_tokens=noise,
                ignore_eos=index % 3 == 0,
                presence_penalty=float(index % 4 == 3),
            )
            sequence = Sequence(
                str(index), list(prompt), params, frozenset([EOS]), noise, MAX_LEN, priority, float(turn)
            )
            sequences[str(index)], got[str(index)] = sequence, []
            scheduler.add(sequence)
        for index, at in aborts.items():
            if at == turn and scheduler.abort((0, str(index))):
                ended[str(index)] = "abort"
        while launched and turn % 3 and not on_device:  # before a step with draft tokens of the host is planned, or not
            commit()
        draft_tokens = oracle.propose()
        scheduler.check_integrity()
        plan = scheduler.schedule(draft_tokens)
        scheduler.check_integrity()
        if plan:
            assert plan.num_tokens <= budget and len(plan) <= scheduler.max_decode_tokens
            if plan.drafts is not None:
                assert not scheduler.batch.sampling.has_penalties[plan.drafts.slots].any()
                assert len(set(plan.slots.tolist())) == len(plan) - int(plan.drafts.counts.sum())
                seen["uncertain"] += on_device and bool((plan.starts >= scheduler.batch.known[plan.slots] + 1).any())
            launched.append((plan, step.run(packer.pack(plan))))
            oracle.epochs.update(zip(plan.slots[plan.sampled].tolist(), plan.epochs[plan.sampled].tolist()))
        while launched and (len(launched) > depth or not plan):
            commit()
        turn += 1
        assert turn < 3000, "the scheduler makes no progress"
    counters = scheduler.counters
    seen["steps"] += len(step.queries)
    seen["accepted"] += counters.accepted
    seen["rejected"] += counters.draft_tokens - counters.accepted
    assert sum(counters.accepted_at) == counters.accepted
    assert pool.num_free == num_blocks - 1, "blocks are held by nobody"
    check_outputs(sequences, got, ended)


def test_the_fuzz_above_saw_all_there_is() -> None:
    if not seen["steps"]:
        pytest.skip("the fuzz was not selected")
    assert (
        seen["steps"] >= 2000 and seen["accepted"] >= 1000 and seen["rejected"] >= 500 and seen["uncertain"] >= 200
    ), seen


def scheduler_of(**overrides) -> Scheduler:
    settings = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=MAX_LEN, max_decode_tokens=16)
    return Scheduler(BlockPool(30, BLOCK), **{**settings, **overrides})


def started(scheduler: Scheduler, name: str = "a", **params) -> Sequence:
    """A sequence of four known tokens, three of them of the prompt, that may be given draft tokens."""
    sequence = Sequence(name, [1, 2, 3], SamplingParams(max_tokens=20, **params), frozenset([EOS]), 0, MAX_LEN)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    scheduler.commit(plan, StepOutput(np.array([4], np.int32)))
    return sequence


def draft(sequence: Sequence, *tokens: int) -> DraftTokens:
    return DraftTokens(
        np.array([sequence.slot], np.int32), np.array([len(tokens)], np.int32), np.array([tokens], np.int32)
    )


def test_a_slot_with_draft_tokens_counts_as_if_all_were_accepted_until_their_verification() -> None:
    scheduler = scheduler_of()
    sequence = started(scheduler)
    plan = scheduler.schedule(draft(sequence, 5, 6))
    packed = Packer(scheduler.batch).pack(plan)
    assert (packed.token_ids.tolist(), packed.starts.tolist(), packed.slots.tolist()) == (
        [4, 5, 6],
        [3, 4, 5],
        [sequence.slot] * 3,
    )
    assert packed.sampled.tolist() == [False] * 3, "no sample is handed over on the device"
    ahead = scheduler.schedule()
    packed = Packer(scheduler.batch).pack(ahead)
    assert (packed.token_ids.tolist(), packed.starts.tolist()) == ([-1], [6]), "the device knows better where it stands"
    result = scheduler.commit(plan, StepOutput(np.array([5, 9, 1], np.int32)))
    assert result.deltas[0].token_ids == [5, 9] and (result.deltas[0].accepted, result.deltas[0].rejected) == (1, 1)
    scheduler.commit(ahead, StepOutput(np.array([8], np.int32)))
    packed = Packer(scheduler.batch).pack(scheduler.schedule())
    assert (packed.token_ids.tolist(), packed.starts.tolist()) == ([8], [6])


@pytest.mark.parametrize("stop", [EOS, 9])
def test_a_slot_preempted_with_draft_tokens_in_flight_keeps_what_was_accepted(stop: int) -> None:
    scheduler = scheduler_of()
    sequence = started(scheduler, stop_token_ids=[stop])
    plan = scheduler.schedule(draft(sequence, 5, 6))
    scheduler.preempt(sequence)
    scheduler.check_integrity()
    assert scheduler.schedule() is None, "it waits for what is in flight"
    result = scheduler.commit(plan, StepOutput(np.array([5, 9, 1], np.int32)))
    scheduler.finish(result)
    scheduler.check_integrity()
    assert result.deltas[0].token_ids == [5, 9]
    again = scheduler.schedule()
    if stop == 9:
        assert sequence.finish_reason == "stop" and again is None and sequence.tokens.tolist() == [1, 2, 3, 4, 5, 9]
    else:
        assert (again.starts.tolist(), again.counts.tolist()) == ([4], [2]), "a block of known tokens is found again"
    scheduler.check_integrity()


def test_log_probabilities_come_with_each_token() -> None:
    scheduler = scheduler_of()
    sequence = started(scheduler, logprobs=1)
    plan = scheduler.schedule(draft(sequence, 5, 6))
    values = np.arange(3, dtype=np.float32)
    logprobs = StepLogprobs(values, np.full(3, 2, np.int32), values.astype(np.int32)[:, None], values[:, None])
    delta = scheduler.commit(plan, StepOutput(np.array([5, 9, 1], np.int32), logprobs)).deltas[0]
    assert [(one.token_id, one.logprob, one.top_ids) for one in delta.logprobs] == [(5, 0.0, [0]), (9, 1.0, [1])]


def test_draft_tokens_are_not_published() -> None:
    """A block full of draft tokens gets a hash once they are the sequence's own, and then for what it holds."""
    scheduler = scheduler_of()
    sequence = started(scheduler)
    plan = scheduler.schedule(draft(sequence, 5, 6, 8, 9))
    scheduler.abort(sequence.key)
    scheduler.commit(plan, StepOutput(np.array([5, 6, 8, 9, 1], np.int32)))
    scheduler.check_integrity()
    again = Sequence("b", [1, 2, 3, 4, 5, 6, 8, 9, 1], SamplingParams(), frozenset(), 0, MAX_LEN)
    scheduler.add(again)
    scheduler.schedule()
    assert again.cached_tokens == 4


@pytest.mark.parametrize(
    ("overrides", "waiting", "expected"),
    [
        (dict(), 0, 15),
        (dict(max_decode_tokens=6), 2, 3),
        (dict(max_num_batched_tokens=9), 0, 4),
        (dict(max_decode_tokens=4), 5, 0),
    ],
)
def test_how_many_draft_tokens_a_step_has_room_for(overrides: dict, waiting: int, expected: int) -> None:
    scheduler = scheduler_of(**overrides)
    started(scheduler)
    for index in range(waiting):
        scheduler.add(Sequence(str(index), [1, 2], SamplingParams(), frozenset(), 0, MAX_LEN))
    assert scheduler.room_for_drafts(8)[2] == expected
