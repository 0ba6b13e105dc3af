"""Draft tokens under grammars: the tokens of a run without, fewer steps where nothing is left to choose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagegraph.compiler.step.inputs import NgramOutput
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens, ScheduledDrafts, Verification
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.spec_decode.grammar_drafter import GrammarDrafter
from tests.runtime.engine.test_engine import Harness
from tests.runtime.engine.test_grammars import compile_first, submit, text, with_grammars

FORCED = r"(xyz1){2,3}[abc]{2}(zyxzyxzyx|1)"


class Nothing:
    """A drafter that drafts nothing; keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[StepResult] = []

    def wants_results(self, running: Plan) -> bool:
        return False

    def propose(self, ahead: bool) -> DraftTokens | None:
        return None

    def learn(
        self, plan: Plan, result: StepResult, ngram: NgramOutput | None, step_ms: float, overhead_ms: float
    ) -> None:
        self.told.append(result)


def drafting(method: str, **options: object) -> Harness:
    harness = with_grammars(draft_tokens="" if method == "none" else method, **options)
    inner = harness.engine.drafter or Nothing()
    harness.engine.drafter = GrammarDrafter(harness.scheduler, inner, 4)
    return harness


def run(harness: Harness, submits: list) -> Harness:
    for one in submits:
        compile_first(harness, one)
        harness.mailbox.put(one)
    harness.run()
    return harness


def requests(regex: str = FORCED, **params: object) -> list:
    held = [submit(f"g{i}", regex, [1 + i, 2, 3, 1 + i, 2, 3], seed=i, max_tokens=25, **params) for i in range(4)]
    return [*held, *(submit(f"p{i}", None, [1, 5, 1, 5], seed=i, max_tokens=25) for i in range(3))]


@pytest.mark.parametrize("method", ["none", "host", "device"])
@pytest.mark.parametrize("params", [{}, {"ignore_eos": True}, {"min_tokens": 3}, {"frequency_penalty": 0.0}])
def test_tokens_are_those_of_a_run_without(method: str, params: dict) -> None:
    plain = run(with_grammars(), requests(**params))
    harness = run(drafting(method), requests(**params))
    assert harness.tokens == plain.tokens and harness.ended == plain.ended
    if params != {"ignore_eos": True}:
        assert harness.scheduler.counters.accepted > 20


@settings(max_examples=40)
@given(
    st.sampled_from(["none", "host", "device"]),
    st.sampled_from([FORCED, "(abc){2,5}x*", "x{7}", "[abc]*z", "(xy1z?)+", "[ab]{1,3}(xyz)?"]),
    st.integers(0, 5),
    st.sampled_from([{}, {"budget": 9}, {"num_blocks": 14}, {"max_num_seqs": 2}]),
)
def test_so_they_are_under_any_grammar_with_chunks_and_preemption(
    method: str, regex: str, seed: int, options: dict
) -> None:
    submits = [submit(f"g{i}", regex, [1 + i, 2, 3] * 3, seed=seed + i) for i in range(3)]
    submits += [submit(f"p{i}", None, [i, 5] * 3, seed=seed) for i in range(3)]
    plain, harness = run(with_grammars(), submits), run(drafting(method, **options), submits)
    assert harness.tokens == plain.tokens and harness.ended == plain.ended


def test_forced_tokens_are_drafted_behind_a_step_in_flight() -> None:
    """A text of twenty tokens without a choice: four of them and one that is sampled in every second step."""
    harness = run(drafting("none"), [submit("one", "(xyz1){5}")])
    assert text(harness.tokens["one"]) == "xyz1" * 5
    assert harness.scheduler.counters.accepted == harness.scheduler.counters.draft_tokens == 12
    assert harness.device.launches <= 9


def test_the_last_token_of_a_text_is_not_drafted() -> None:
    harness = run(drafting("none"), [submit("one", "xyz1")])
    assert text(harness.tokens["one"]) == "xyz1" and harness.scheduler.counters.draft_tokens == 2


def test_the_other_drafter_learns_of_its_own_draft_tokens_alone() -> None:
    harness, inner = drafting("none"), Nothing()
    drafter = GrammarDrafter(harness.scheduler, inner, 4)
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    drafts = ScheduledDrafts(ints(3, 5), ints(1, 1), ints(0, 2), np.zeros(4, bool), None, np.array([True, False]))
    found = Verification(ints(3, 5), ints(1, 1), ints(1, 0), np.zeros((2, 2), np.int32), ints(2, 1), np.zeros(2, bool))
    none = np.zeros(0, np.int32)
    result = StepResult(none, none, none, none, {}, [], [], found)
    plan = Plan(ints(3, 3, 5, 5), none, none, none, none, [], drafts)
    drafter.learn(plan, result, None, 1.0, 0.0)
    (told,) = inner.told
    assert told.verification is not None and told.verification.slots.tolist() == [5]
    assert found.slots.tolist() == [3, 5] and result.verification is found


def test_a_grammar_that_raises_gets_no_draft_tokens_and_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, harness = run(with_grammars(), requests()), drafting("host")
    from pagegraph.runtime.grammar.matcher import TokenMatcher

    def broken(self: TokenMatcher, *_: object) -> None:
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(TokenMatcher, "forced", broken)
    monkeypatch.setattr(TokenMatcher, "admits", broken)
    run(harness, requests())
    assert harness.tokens == plain.tokens and harness.ended == plain.ended
