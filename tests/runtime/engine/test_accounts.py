"""Limits of keys, the fair queue of keys, and their prefix caches, by the engine's own loop. A turn lasts a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagegraph.runtime.askers import Asker
from pagegraph.runtime.engine.account_book import SharedBook
from pagegraph.runtime.ipc.protocol import Abort, Admitted, Failed, Member, Quota, Quotas, SamplingParams, SubmitGroup
from tests.runtime.engine.test_engine import Harness


def asks(name: str, asker: Asker, prompt: list[int] | None = None, max_tokens: int = 3, count: int = 1) -> SubmitGroup:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    members = [Member(name if count == 1 else f"{name}.{place}", 0, params) for place in range(count)]
    return SubmitGroup(prompts=[prompt or [1, 2, 3]], members=members, asker=asker, cache_salt=asker.name)


class Told(Harness):
    """Keeps what each request was told of its key's quotas."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.quotas: dict[str, Quotas | None] = {}
        send = self.mailbox.send

        def keep(client, message):
            if isinstance(message, Admitted | Failed):
                self.quotas[message.request_id] = message.quotas
            send(client, message)

        self.mailbox.send = keep

    def ask(self, *groups: SubmitGroup) -> None:
        for group in groups:
            self.mailbox.put(group)
        self.turn()

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.turn()

    @property
    def refused(self) -> list[str]:
        return [failed.request_id for failed in self.failures]


def test_requests_a_minute() -> None:
    harness, asker = Told(max_queue=50), Asker("a", requests_per_minute=6)
    harness.ask(*(asks(f"{n}", asker) for n in range(8)))
    assert harness.refused == ["6", "7"]
    assert {failed.status for failed in harness.failures} == {429}
    assert "requests_per_minute = 6 of this key; try again in 10 s" in harness.failures[0].message
    assert harness.failures[0].retry_after_s == pytest.approx(10)
    assert harness.quotas["0"] == Quotas(requests=Quota(6, 5, 10.0))
    assert harness.quotas["6"] == Quotas(requests=Quota(6, 0, 60.0))
    harness.wait(9)  # one comes back every ten seconds
    harness.ask(asks("8", asker), asks("9", asker), asks("another's", Asker("b", requests_per_minute=1)))
    assert harness.refused == ["6", "7", "9"]
    assert harness.quotas["another's"] == Quotas(requests=Quota(1, 0, 60.0))


def test_tokens_a_minute_are_paid_for_prompts_and_for_answers_as_they_come() -> None:
    harness, asker = Told(), Asker("a", tokens_per_minute=30)
    harness.ask(asks("prompt", asker, prompt=[5] * 20, max_tokens=20))
    assert harness.quotas["prompt"] == Quotas(tokens=Quota(30, 10, 40.0))
    harness.wait(10)  # five come back, about ten are generated
    harness.ask(asks("large", asker, prompt=[6] * 15))
    assert harness.refused == ["large"]
    quota = harness.quotas["large"].tokens
    assert 3 <= quota.remaining <= 7
    assert harness.failures[0].retry_after_s == pytest.approx(2 * (15 - quota.remaining), abs=2.1)
    harness.ask(asks("small", asker, prompt=[6] * 3))
    assert harness.refused == ["large"]
    harness.run()
    assert len(harness.tokens["prompt"]) == 20


def test_an_answer_may_put_a_key_in_debt_and_a_large_prompt_needs_a_full_bucket() -> None:
    harness, asker = Told(), Asker("a", tokens_per_minute=10)
    harness.ask(asks("large", asker, prompt=[5] * 25, max_tokens=10))
    harness.run()
    harness.ask(asks("next", asker))
    assert harness.refused == ["next"]
    # 10 - 25 - 10 and what a dozen seconds gave; three are wanted.
    assert harness.failures[0].retry_after_s == pytest.approx((3 + 25 - 12 / 6) * 6, rel=0.2)


def test_an_aborted_answer_is_paid_for_as_far_as_it_got() -> None:
    harness, asker = Told(), Asker("a", tokens_per_minute=60)
    harness.ask(asks("left", asker, prompt=[5] * 10, max_tokens=30))
    harness.wait(20)
    harness.mailbox.put(Abort("left"))
    harness.wait(1)
    harness.ask(asks("next", asker, prompt=[6]))
    # Full but for what about twenty seconds gave: 10 of the prompt, some 20 of the answer, and one.
    assert 45 <= harness.quotas["next"].tokens.remaining <= 52


def test_requests_at_once() -> None:
    harness, asker = Told(max_queue=50, max_num_seqs=2), Asker("a", max_parallel_requests=3)
    harness.ask(*(asks(f"{n}", asker, max_tokens=5) for n in range(4)), asks("b", Asker("b", max_parallel_requests=1)))
    assert harness.refused == ["3"] and "max_parallel_requests = 3 of this key" in harness.failures[0].message
    harness.run()
    harness.ask(asks("pair", asker, count=2), asks("more", asker, count=9), asks("too many", asker))
    assert harness.refused == ["3", "too many"]  # one of several sequences is taken whole
    harness.run()


def test_a_key_that_was_refused_pays_nothing_and_one_without_limits_is_told_nothing() -> None:
    harness, asker = Told(max_num_seqs=1, max_queue=1), Asker("", requests_per_minute=100)
    harness.ask(*(asks(f"{n}", asker, max_tokens=50) for n in range(3)))
    assert [(failed.request_id, failed.status) for failed in harness.failures] == [("2", 503)]
    harness.ask(asks("bad", asker, prompt=[10**6]))
    harness.run()
    harness.ask(asks("3", asker), asks("free", Asker()))
    assert harness.quotas["3"].requests.remaining >= 98 and harness.quotas["free"] is None


def test_what_an_engine_before_had_admitted_is_counted_and_not_refused() -> None:
    harness, asker = Told(max_queue=50), Asker("a", requests_per_minute=1)
    for number in range(3):
        group = asks(f"{number}", asker)
        harness.mailbox.put(
            SubmitGroup(**{name: getattr(group, name) for name in group.__struct_fields__} | {"taken": True})
        )
    harness.ask(asks("new", asker))
    assert harness.refused == ["new"] and harness.failures[0].retry_after_s == pytest.approx(180, rel=0.05)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Told, Told]:
    """Two engines of one server, whose clocks are the same."""
    return tuple(Told(max_queue=50, book=SharedBook(tmp_path / "accounts", rank)) for rank in range(2))


def test_a_key_has_its_limits_once_whichever_engine_it_asks(pair: tuple[Told, Told]) -> None:
    first, second = pair
    asker = Asker("a", requests_per_minute=6, max_parallel_requests=4)
    first.ask(*(asks(f"{n}", asker, max_tokens=40) for n in range(2)))
    second.ask(*(asks(f"{n}", asker, max_tokens=40) for n in range(3)))
    assert (first.refused, second.refused) == ([], ["2"])
    assert "max_parallel_requests = 4" in second.failures[0].message
    assert second.quotas["1"].requests.remaining == 2
    first.run()
    second.wait(first.turns - second.turns)  # the same time has passed there
    second.run()
    second.ask(asks("again", asker))
    assert second.refused == ["2"]


def test_what_one_engine_generates_another_counts(pair: tuple[Told, Told]) -> None:
    first, second = pair
    asker = Asker("a", tokens_per_minute=30)
    first.ask(asks("long", asker, max_tokens=30))
    for harness in pair:
        harness.wait(20)  # ten come back, about twenty are generated
    second.ask(asks("other", asker, prompt=[5] * 25))
    assert second.refused == ["other"] and 12 <= second.quotas["other"].tokens.remaining <= 20
    first.run()
    first.wait(2)
    second.wait(first.turns - second.turns)
    second.ask(asks("later", asker, prompt=[5] * 25))  # all that was generated is paid for
    assert second.refused == ["other", "later"] and 10 <= second.quotas["later"].tokens.remaining <= 18


def test_an_engine_that_ended_leaves_what_was_paid_and_none_of_its_requests(tmp_path: Path) -> None:
    asker = Asker("a", requests_per_minute=6, max_parallel_requests=2)
    first, second = (Told(book=SharedBook(tmp_path / "accounts", rank)) for rank in range(2))
    first.ask(*(asks(f"{n}", asker, max_tokens=40) for n in range(2)))
    second.ask(asks("too many", asker))
    assert second.refused == ["too many"]
    anew = Told(book=SharedBook(tmp_path / "accounts", 0))
    anew.ask(asks("2", asker))
    second.ask(asks("3", asker))
    assert not anew.refused and second.refused == ["too many"]
    assert second.quotas["3"].requests.remaining == 2


def test_a_key_of_a_thousand_prompts_does_not_starve_one_of_another() -> None:
    """Its queue is not full for the other, whose one is the next to run."""
    harness = Told(max_queue=90, max_num_seqs=4)
    many, one = Asker("many"), Asker("one")
    harness.ask(*(asks(f"m{n}", many, max_tokens=6) for n in range(1000)))
    waiting = harness.scheduler.waiting_of("many")[0]
    assert 75 <= waiting <= 80 and len(harness.refused) == 1000 - 4 - waiting  # 8/9 of the queue
    assert {failed.status for failed in harness.failures} == {503}
    assert "max_queue is 90; " in harness.failures[0].message
    harness.ask(asks("one", one, max_tokens=2))
    asked = harness.turns
    while "one" not in harness.ended:
        harness.turn()
    assert harness.turns - asked <= 6 + 2 + 2 and harness.ended["one"] == "length"
    assert harness.scheduler.waiting_of("many")[0] > 60
    harness.run()


def test_each_key_may_always_have_one_waiting() -> None:
    harness = Told(max_queue=2, max_queue_tokens=5, max_num_seqs=1)
    harness.ask(*(asks(f"{asker}{n}", Asker(asker), max_tokens=20) for n in range(3) for asker in "abcdef"))
    assert harness.scheduler.num_waiting == 6 - 1 and {name[1] for name in harness.refused} == {"1", "2"}
    harness.run()


def test_a_key_hits_its_own_prefixes_alone() -> None:
    harness, prompt = Told(), [n % 6 + 1 for n in range(30)]
    for name, asker, cached in (("1", "a", 0), ("2", "a", 28), ("3", "b", 28), ("4", "b", 56)):
        harness.ask(asks(name, Asker(asker), prompt=prompt, max_tokens=1))
        harness.run()
        assert harness.cached == cached, name
