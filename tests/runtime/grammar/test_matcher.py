"""What drafters ask of a matcher: the answers, and who pays for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from llguidance import LLMatcher, LLTokenizer

from pagegraph.runtime.grammar.compiler import Grammar
from pagegraph.runtime.grammar.matcher import TokenMatcher
from pagegraph.runtime.grammar.workers import CREDIT_S, SHARE_S, is_too_dear

BURNT_S = 0.02


def burning(answer: Any) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        until = time.thread_time() + BURNT_S
        while time.thread_time() < until:
            pass
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


def matcher_of(grammar: str) -> TokenMatcher:
    return TokenMatcher(Grammar(b"", LLMatcher(LLTokenizer("byte"), grammar)))


def test_forced_tokens_and_how_many_draft_tokens_may_follow() -> None:
    matcher = matcher_of('start: "abc" /[xy]/ "d"')
    assert bytes(matcher.forced()) == b"abc"
    assert matcher.admits(b"abcxd") == 4  # behind the last the text could only end
    assert matcher.admits(b"abcz") == 3 and matcher.admits(b"z") == 0
    assert matcher.take(b"abcy") and bytes(matcher.forced()) == b"d" and matcher.admits(b"d") == 0


def test_cheap_calls_cost_nothing_and_are_work_all_the_same() -> None:
    matcher = matcher_of('start: "abc"')
    matcher.forced()
    matcher.admits(b"ab")
    assert matcher.overdrawn_s == 0 and matcher.grammar.work_s > 0


@pytest.mark.parametrize("answer", [[], RuntimeError("a fault of its own")])
@pytest.mark.parametrize("name", ["forced", "admits"])
def test_dear_calls_about_draft_tokens_are_found_out(name: str, answer: Any) -> None:
    inner = Mock(compute_ff_tokens=burning(answer), validate_tokens=burning(answer))
    matcher = TokenMatcher(Mock(start=lambda: inner, work_s=0.0))
    for _ in range(2):
        try:
            matcher.forced() if name == "forced" else matcher.admits([1])
        except RuntimeError:
            assert isinstance(answer, RuntimeError)
    assert matcher.overdrawn_s >= 2 * (BURNT_S - SHARE_S / 2) and matcher.grammar.work_s >= 2 * BURNT_S
    assert not is_too_dear(matcher)
    matcher.overdrawn_s += CREDIT_S
    assert is_too_dear(matcher)
