"""The engine's loop with grammars, over a step without a model: masks in time, and what a fault of one costs."""

from __future__ import annotations

import re
import threading
import time
from concurrent import futures
from unittest.mock import Mock

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from pagegraph.runtime.engine.grammars import Grammars
from pagegraph.runtime.grammar import compiler as compiling
from pagegraph.runtime.grammar import workers
from pagegraph.runtime.grammar.compiler import GrammarCompiler
from pagegraph.runtime.grammar.step_masks import StepMasks
from pagegraph.runtime.ipc.protocol import Abort, Failed, Member, SamplingParams, Submit, SubmitGroup
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.structured_output import StructuredOutputs
from tests.runtime.engine.test_engine import Harness
from tests.runtime.fake_step import EOS, VOCAB

TOKENS = [b"a", b"b", b"c", b"ab", b"x", b"y", b"1", b"<eos>", b"bc", b"z", b"abc"]
LETTERS = r"[abcxyz1]{3,12}"


class Vocabulary:
    """Eleven tokens, in the form that llguidance takes."""

    eos_token_id, bos_token_id, tokens, special_token_ids = EOS, None, TOKENS, [EOS]

    def __call__(self, text: str) -> list[int]:
        return [TOKENS.index(bytes([byte])) for byte in text.encode()]


def with_grammars(**options: object) -> Harness:
    def grammars(scheduler: Scheduler) -> Grammars:
        compiler = GrammarCompiler(lambda: LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=VOCAB, eos_token=[EOS]))  # type: ignore[arg-type]
        return Grammars(compiler, StepMasks(scheduler.batch, compiler, frozenset([EOS])))

    return Harness(**{"max_queue": 20, "grammars": grammars} | options)  # type: ignore[arg-type]


def submit(name: str, regex: str | None = None, prompt: list[int] | None = None, **params: object) -> Submit:
    structured = None if regex is None else StructuredOutputs(regex=regex)
    sampling = SamplingParams(**{"max_tokens": 20, "seed": 3} | params, structured_outputs=structured)  # type: ignore[arg-type]
    return Submit(request_id=name, token_ids=prompt or [1, 2, 3], params=sampling)


def text(tokens: list[int]) -> str:
    return b"".join(TOKENS[token] for token in tokens if token != EOS).decode()


def ran(*submits: Submit, **options: object) -> Harness:
    harness = with_grammars(**options)
    for one in submits:
        compile_first(harness, one)
        harness.mailbox.put(one)
    harness.run()
    return harness


def compile_first(harness: Harness, one: Submit) -> None:
    """So that sequences start in the order they came in."""
    if (structured := one.params.structured_outputs) is not None:
        assert harness.engine.grammars is not None
        futures.wait([harness.engine.grammars._compiler.compile(structured)])


def turn_until(harness: Harness, name: str, num_tokens: int) -> None:
    """Until the sequence has so many tokens, and is not done."""
    while len(harness.tokens.get(name, [])) < num_tokens:
        harness.turn()
        assert name not in harness.ended and harness.turns < 1000


def mixed() -> list[Submit]:
    """Sequences with grammars and without, side by side."""
    with_grammar = [submit(f"g{i}", LETTERS, [1 + i, 2, 3], seed=i) for i in range(4)]
    return [*with_grammar, *(submit(f"p{i}", None, [1 + i, 5], seed=i) for i in range(4))]


def test_outputs_match_and_neighbours_get_the_tokens_of_a_run_without() -> None:
    harness = ran(*mixed())
    plain = ran(*[one for one in mixed() if one.request_id.startswith("p")])
    for name, tokens in harness.tokens.items():
        if name.startswith("g"):
            assert re.fullmatch(LETTERS, text(tokens)) and harness.ended[name] == "stop"
        else:
            assert tokens == plain.tokens[name] and harness.ended[name] == plain.ended[name]


@pytest.mark.parametrize(
    "options",
    [{"budget": 8}, {"num_blocks": 14}, {"max_num_seqs": 2}, {"caching": False}, {"num_blocks": 12, "budget": 9}],
)
def test_chunks_preemption_and_fewer_slots_change_no_token(options: dict) -> None:
    submits = [submit(f"g{i}", LETTERS, [(i + at) % 7 for at in range(9)], seed=i) for i in range(5)]
    submits += [submit(f"p{i}", None, [i, 5], seed=i) for i in range(3)]
    whole, cut = ran(*submits), ran(*submits, **options)
    assert cut.tokens == whole.tokens and cut.ended == whole.ended
    if "num_blocks" in options:
        assert cut.scheduler.counters.preemptions > 0


def test_a_text_that_can_only_end_ends_without_a_further_token() -> None:
    harness = ran(submit("one", "abc"), submit("two", "x{5}"))
    assert text(harness.tokens["one"]) == "abc" and text(harness.tokens["two"]) == "xxxxx"
    assert EOS not in harness.tokens["one"] + harness.tokens["two"]
    assert harness.ended == {"one": "stop", "two": "stop"}


def test_a_text_may_end_only_where_its_grammar_does() -> None:
    harness = ran(*[submit(f"{seed}", "(xy)*z", seed=seed) for seed in range(8)])
    for name, tokens in harness.tokens.items():
        assert harness.ended[name] in ("stop", "length")
        assert re.fullmatch("(xy)*z" if harness.ended[name] == "stop" else "(xy)*x?", text(tokens))


def test_max_tokens_cuts_a_text_short() -> None:
    harness = ran(submit("one", "x{9}", max_tokens=4))
    assert text(harness.tokens["one"]) == "xxxx" and harness.ended == {"one": "length"}


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 15}])
def test_who_must_not_sample_the_end_ends_where_nothing_else_may_follow(params: dict) -> None:
    harness = ran(*[submit(f"{seed}", "[xyz1]{3,9}", seed=seed, **params) for seed in range(4)])
    assert {len(text(tokens)) for tokens in harness.tokens.values()} == {9}
    assert set(harness.ended.values()) == {"stop"}
    assert all(EOS not in tokens for tokens in harness.tokens.values())


def test_a_stop_id_ends_a_text_before_its_grammar_does() -> None:
    harness = ran(submit("one", "x{9}", stop_token_ids=[TOKENS.index(b"x")]))
    assert text(harness.tokens["one"]) == "x" and harness.ended == {"one": "stop"}


def test_ids_that_leave_no_token_are_the_requests_fault() -> None:
    harness = ran(submit("one", "b{5}", allowed_token_ids=[5, 6]), submit("two", "a{5}"))
    assert harness.ended == {"one": "400", "two": "stop"}
    assert "allowed_token_ids" in harness.failures[0].message


def test_a_bad_grammar_refuses_its_group_before_it_is_admitted() -> None:
    harness = with_grammars()
    good, bad = submit("g", "ab"), submit("g", "ab").params
    bad = SamplingParams(structured_outputs=StructuredOutputs(grammar="start: <|nope|>"))
    harness.mailbox.put(SubmitGroup(prompts=[[1, 2]], members=[Member("0", 0, good.params), Member("1", 0, bad)]))
    harness.mailbox.put(submit("other", "ab"))
    harness.run()
    assert harness.ended == {"0": "400", "1": "400", "other": "stop"} and len(harness.failures) == 1
    assert harness.failures[0].request_id == "1" and "unknown special token" in harness.failures[0].message
    assert harness.failures[0].field == "structured_outputs.grammar"
    harness.mailbox.put(Submit(request_id="raw", token_ids=[1], params=SamplingParams(structured_outputs=unchecked())))
    harness.run()
    assert harness.failures[1].status == 400 and harness.failures[1].field == "structured_outputs.json"
    assert harness.failures[1].message.endswith("at /items: the keyword not is not supported; leave it out")


def unchecked() -> StructuredOutputs:
    return StructuredOutputs(json={"items": {"not": {}}})


def test_an_engine_without_grammars_refuses_them() -> None:
    harness = Harness()
    harness.mailbox.put(submit("one", "ab"))
    harness.run()
    assert harness.ended == {"one": "400"} and "not served" in harness.failures[0].message


def test_others_run_while_a_grammar_is_compiled_and_an_abort_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, go_on = with_grammars(), threading.Event()
    real = compiling.grammar_text
    monkeypatch.setattr(compiling, "grammar_text", lambda structured: (go_on.wait(20), real(structured))[1])
    for name in ("slow", "gone"):
        harness.mailbox.put(submit(name, "abc"))
    harness.mailbox.put(submit("plain"))
    while "plain" not in harness.ended:
        harness.turn()
    assert not harness.tokens.get("slow") and not harness.engine.idle
    harness.mailbox.put(Abort("gone"))
    harness.turn()
    go_on.set()
    harness.run()
    assert text(harness.tokens["slow"]) == "abc" and "gone" not in harness.tokens


def test_sequences_that_wait_for_their_grammar_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, go_on = with_grammars(max_queue=2, max_num_seqs=1), threading.Event()
    monkeypatch.setattr(compiling, "grammar_text", lambda structured: go_on.wait(20) and 'start: "ab"')
    for name in "abcdef":
        harness.mailbox.put(submit(name, "ab"))
    harness.turn()
    assert harness.ended == dict.fromkeys("def", "503")
    go_on.set()
    harness.run()
    assert [harness.ended[name] for name in "abc"] == ["stop"] * 3


def test_what_an_engine_before_had_admitted_is_not_refused_for_waiting_for_its_grammar_again() -> None:
    harness = with_grammars(max_queue=1, max_num_seqs=1)
    for name in "abcd":
        one = submit(name, "ab")
        group = SubmitGroup(prompts=[one.token_ids], members=[Member(name, 0, one.params)], taken=True)
        harness.mailbox.put(group)
    harness.run()
    assert harness.ended == dict.fromkeys("abcd", "stop")


def test_a_grammar_that_hangs_while_it_is_compiled_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """However well others go on: those that wait for it, and for its thread, would wait for ever."""
    harness, go_on, hangs = with_grammars(), threading.Event(), threading.Event()
    real = compiling.grammar_text
    monkeypatch.setattr(compiling, "grammar_text", lambda one: (hangs.set(), go_on.wait(20), real(one))[2])
    harness.mailbox.put(submit("hangs", "abc"))
    harness.turn()
    assert hangs.wait(10)
    now = time.monotonic()
    monkeypatch.setattr(compiling.time, "monotonic", lambda: now + 100.0)
    harness.mailbox.put(submit("plain"))
    while "plain" not in harness.ended:
        harness.turn()
    assert harness.engine.stalled_s >= 99
    go_on.set()
    harness.run()
    assert text(harness.tokens["hangs"]) == "abc" and harness.engine.stalled_s == 0


def test_equal_grammars_are_compiled_once_and_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = compiling.grammar_text
    monkeypatch.setattr(
        compiling, "grammar_text", lambda structured: (asked.append(structured.regex), real(structured))[1]
    )
    monkeypatch.setattr(compiling, "MAX_GRAMMARS", 2)
    harness = with_grammars()
    for regex in ("a", "a", "b", "a", "c", "a", "b"):
        harness.mailbox.put(submit(f"{len(harness.ended)}", regex))
        harness.run()
    assert asked == ["a", "b", "c", "b"]


class Broken:
    """A matcher that raises."""

    def __getattr__(self, name: str) -> None:
        raise RuntimeError("a fault of this grammar's own")


@pytest.mark.parametrize("when", ["compile", "mask", "advance", "replay"])
def test_an_exception_of_a_grammar_ends_its_request_alone(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"g{i}" for i in range(4)] + [f"p{i}" for i in range(3)]
    alone, harness = ran(*mixed()[:7]), with_grammars()
    submits = [*mixed()[:7], submit("bad", "[abc]{4,9}")]
    if when == "compile":
        real = compiling.grammar_text

        def text_of(structured: StructuredOutputs) -> str:
            if structured.regex == "[abc]{4,9}":
                raise RuntimeError("a fault of this grammar's own")
            return real(structured)

        monkeypatch.setattr(compiling, "grammar_text", text_of)
    for one in submits:
        harness.mailbox.put(one)
    if when != "compile":
        turn_until(harness, "bad", 2)
        bad = next(one for one in harness.scheduler.live if one.request_id == "bad")
        break_it(harness, bad.grammar, when)
    harness.run()
    assert harness.ended.pop("bad") == "500"
    assert {name: harness.tokens[name] for name in names} == alone.tokens and harness.ended == alone.ended


def break_it(harness: Harness, matcher, when: str) -> None:
    """Let the matcher raise from now on, where `when` says."""
    masks = harness.engine.grammars.masks
    if when == "mask":
        real = masks._compute_all

        def compute(places, *arguments):
            if any(place.matcher is matcher for place in places):
                raise RuntimeError("a fault of this grammar's own")
            return real(places, *arguments)

        masks._compute_all = compute
    elif when == "advance":
        matcher.matcher = Broken()
        matcher.replay = matcher.take = lambda tokens: Broken().raises
    else:
        matcher.num_tokens += 1  # in doubt: it is made anew
        matcher.replay = lambda tokens: Broken().raises


def test_a_matcher_that_is_in_doubt_is_made_anew() -> None:
    whole, harness = ran(*mixed()), with_grammars()
    for one in mixed():
        harness.mailbox.put(one)
    turn_until(harness, "g0", 2)
    for sequence in harness.scheduler.live:
        if sequence.grammar is not None:
            sequence.grammar.matcher = sequence.grammar.grammar.start()
            sequence.grammar.num_tokens = 0
    harness.run()
    assert harness.tokens == whole.tokens and harness.ended == whole.ended


@pytest.mark.parametrize("where", ["breaks", "refuses"])
def test_a_failed_step_is_run_again_with_its_masks(where: str) -> None:
    whole, harness = ran(*mixed()), with_grammars()
    for one in mixed():
        harness.mailbox.put(one)
    failures = iter([False] * 3 + [True])
    setattr(harness.device, where, lambda step: next(failures, False))
    harness.run()
    assert harness.tokens == whole.tokens and harness.ended == whole.ended


def test_a_grammar_that_runs_out_of_its_limits_ends_its_request() -> None:
    harness = with_grammars()
    harness.mailbox.put(submit("one", "a{20}"))
    harness.mailbox.put(submit("two", "a{20}"))
    turn_until(harness, "two", 2)
    one = next(one for one in harness.scheduler.live if one.request_id == "one")
    one.grammar.matcher.consume_token(TOKENS.index(b"z"))  # an error that it does not leave
    assert isinstance(one.grammar.matcher, LLMatcher) and one.grammar.matcher.is_error()
    harness.run()
    assert harness.ended["one"] in ("400", "500") and harness.ended["two"] == "length"
    assert isinstance(harness.failures[0], Failed) and harness.failures[0].field == "structured_outputs"


def submit_grammar(name: str, grammar: str, **params: object) -> Submit:
    structured = StructuredOutputs(grammar=grammar)
    sampling = SamplingParams(**{"max_tokens": 60, "seed": 3} | params, structured_outputs=structured)  # type: ignore[arg-type]
    return Submit(request_id=name, token_ids=[1, 2, 3], params=sampling)


def test_a_grammar_whose_tokens_take_too_long_ends_its_request_alone() -> None:
    alone, harness = ran(*mixed()), with_grammars()
    for one in [*mixed(), submit("dear", "[abc]{19}")]:
        harness.mailbox.put(one)
    turn_until(harness, "dear", 2)
    next(one for one in harness.scheduler.live if one.request_id == "dear").grammar.overdrawn_s = workers.CREDIT_S + 1
    harness.run()
    assert harness.ended.pop("dear") == "400" and len(harness.tokens.pop("dear")) < 6
    assert "its tokens take too long" in harness.failures[0].message and len(harness.failures) == 1
    assert harness.tokens == alone.tokens and harness.ended == alone.ended


class Dear:
    """A matcher whose tokens take 30 ms of a processor each."""

    overdrawn_s = 0.0
    grammar = Mock(work_s=0.0)

    def take(self, tokens: list[int]) -> bool:
        until = time.thread_time() + 0.03
        while time.thread_time() < until:
            pass
        return True


def test_who_takes_more_than_its_share_is_found_among_others() -> None:
    matchers = [Dear(), Mock(take=lambda tokens: True, overdrawn_s=0.0, grammar=Mock(work_s=0.0))]
    several = workers.GrammarWorkers()
    for _ in range(2):
        several.is_timing = True
        assert several.consume([(matcher, [1]) for matcher in matchers]) == [True, True]  # type: ignore[misc]
    assert 0.04 < matchers[0].overdrawn_s < workers.CREDIT_S and matchers[1].overdrawn_s == 0
    assert not workers.is_too_dear(matchers[0])  # type: ignore[arg-type]
    assert matchers[0].grammar.work_s > 0.02
    matchers[0].overdrawn_s += workers.CREDIT_S
    assert workers.is_too_dear(matchers[0])  # type: ignore[arg-type]


def test_threads_share_masks_while_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ran(*mixed())
    monkeypatch.setattr(workers, "NUM_THREADS", 2)
    monkeypatch.setattr(workers, "SHARED_S", 0.0)
    shared = ran(*mixed())
    assert shared.engine.grammars.masks._workers.is_sharing  # type: ignore[union-attr]
    assert shared.tokens == alone.tokens and shared.ended == alone.ended


def test_calls_are_timed_one_by_one_while_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = ran(*mixed())
    masks = harness.engine.grammars.masks  # type: ignore[union-attr]
    assert not masks._workers.is_timing and all(
        not one.grammar.overdrawn_s for one in harness.scheduler.live if one.grammar
    )
    monkeypatch.setattr(workers, "SLOW_S", 0.0)
    timed = ran(*mixed())
    assert timed.engine.grammars.masks._workers.is_timing  # type: ignore[union-attr]
    assert timed.tokens == harness.tokens and timed.ended == harness.ended


def test_what_a_grammar_cannot_go_on_for_is_the_requests_fault() -> None:
    """The row after a token is beyond the limits, so the token is not taken though the mask has it."""
    many = 'start: a{0,10000}\na: b{0,10000}\nb: "x"{0,10000}'
    harness = ran(submit_grammar("many", many, ignore_eos=True), submit("other", "a{5}"))
    assert harness.ended == {"many": "400", "other": "stop"}
    assert "too much may follow at one place" in harness.failures[0].message


def test_grammars_that_have_taken_much_work_are_not_kept_for_ever() -> None:
    """What they found out by it takes memory. The last asked for go last, and then by themselves."""
    harness = ran(submit("a", "a{5}"), submit("b", "b{5}"))
    compiler = harness.engine.grammars._compiler  # type: ignore[union-attr]
    first, second = (compiler.compile(StructuredOutputs(regex=regex)) for regex in ("a{5}", "b{5}"))
    assert first.result().work_s > 0 and second.result().work_s > 0
    first.result().work_s = second.result().work_s = 0.6 * compiling.MAX_KEPT_WORK_S
    assert compiler.compile(StructuredOutputs(regex="b{5}")) is second
    assert compiler.compile(StructuredOutputs(regex="a{5}")) is not first
    second.result().work_s = 2 * compiling.MAX_KEPT_WORK_S
    assert compiler.compile(StructuredOutputs(regex="b{5}")) is not second
