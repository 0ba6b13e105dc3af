"""The engine's loop over a step without a model: what is admitted, and what an exception costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.step import Ticket
from pagegraph.runtime.engine.account_book import Book
from pagegraph.runtime.engine.engine import Engine
from pagegraph.runtime.engine.grammars import Grammars
from pagegraph.runtime.engine.limits import Limits
from pagegraph.runtime.engine.metrics import EngineMetrics
from pagegraph.runtime.engine.stats import EngineStats
from pagegraph.runtime.ipc.protocol import Abort, Admitted, Failed, Member, SamplingParams, Submit, SubmitGroup, Tokens
from pagegraph.runtime.llm import CLIENT, LocalMailbox
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.scheduler import commit as results
from pagegraph.runtime.scheduler.block_pool import BlockPool
from pagegraph.runtime.scheduler.chunk_limit import ChunkLimit
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.pack import Packer
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.step_time import StepTime
from pagegraph.runtime.spec_decode.device_drafter import DeviceDrafter
from pagegraph.runtime.spec_decode.host_drafter import HostDrafter
from pagegraph.runtime.spec_decode.proposer import NgramProposer
from tests.runtime.fake_step import BLOCK, EOS, MAX_LEN, VOCAB, FakeStep


class Harness:
    """An engine, and what it said of each request."""

    def __init__(
        self, *, num_blocks: int = 60, max_num_seqs: int = 8, budget: int = 32, max_queue: int = 5, caching: bool = True,
        max_queue_tokens: int | None = None, draft_tokens: str = "", pooler: Pooler = Pooler(3), grammars: Callable[[Scheduler], Grammars] | None = None,
        book: Book | None = None,
    ) -> None:  # fmt: skip
        on_device = draft_tokens == "device"
        self.device = FakeStep(
            num_blocks, max_num_seqs, (lambda history, seed: (history[-2:], 1)) if on_device else None
        )
        self.scheduler = Scheduler(
            BlockPool(num_blocks, BLOCK, caching), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget,
            max_model_len=MAX_LEN, max_decode_tokens=3 * max_num_seqs,
        )  # fmt: skip
        drafter = None
        if draft_tokens:
            drafter = (
                DeviceDrafter(self.scheduler, 2) if on_device else HostDrafter(self.scheduler, NgramProposer(1, 3), 2)
            )
        self.mailbox = LocalMailbox()
        self.metrics = EngineMetrics("m", MAX_LEN)
        self.turns = 0
        self.engine = Engine(
            self.device, self.scheduler, self.mailbox,
            Limits(VOCAB, MAX_LEN, frozenset([EOS]), max_queue, pooler, max_queue_tokens=max_queue_tokens), None,
            lambda: float(self.turns), EngineStats(self.metrics, self.scheduler, StepCounts()), drafter=drafter,
            grammars=None if grammars is None else grammars(self.scheduler), book=book,
        )  # fmt: skip
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}  # finish reason, or the status of a failure
        self.failures: list[Failed] = []
        self.cached = 0  # as usage tells

    def turn(self) -> None:
        self.engine.turn()
        self.turns += 1
        self.scheduler.check_integrity()
        for message in self.mailbox.take():
            if isinstance(message, Failed):
                self.failures.append(message)
                for request_id in (message.request_id, *message.others):
                    self._end(request_id, str(message.status))
            elif isinstance(message, Tokens):
                for delta in message.each():
                    assert delta.request_id not in self.ended, "a token after the end"
                    self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                    if delta.finish_reason:
                        self.cached += delta.cached_tokens
                        self._end(delta.request_id, delta.finish_reason)

    def run(self) -> None:
        while self.mailbox.inbox or not self.engine.idle:
            self.turn()
            assert self.turns < 5000, "the engine makes no progress"

    def _end(self, request_id: str, reason: str) -> None:
        assert request_id not in self.ended, "a request ended twice"
        self.ended[request_id] = reason


def group_of(count: int, prompt: list[int] | None = None, first: int = 0) -> SubmitGroup:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    return SubmitGroup(
        prompts=[prompt or [1, 2, 3]], members=[Member(f"g{first + i}", 0, params) for i in range(count)]
    )


def test_samples_of_a_prompt_are_one_request_to_the_metrics() -> None:
    harness = Harness(max_queue=10)
    harness.mailbox.put(group_of(3))
    harness.mailbox.put(group_of(1, first=3))
    harness.run()
    told = harness.metrics.render().decode()
    for line in ("request_params_n_sum{%s} 4.0", "request_params_n_count{%s} 2.0", "request_max_num_generation_tokens_sum{%s} 6.0",
                 "request_generation_tokens_sum{%s} 12.0", "request_params_max_tokens_sum{%s} 12.0"):  # fmt: skip
        assert "vllm:" + line % 'engine="0",model_name="m"' in told, line


def test_a_group_larger_than_the_queue_is_admitted_whole_on_an_idle_server() -> None:
    harness = Harness(max_queue=5)
    harness.mailbox.put(group_of(300))
    harness.run()
    assert set(harness.ended.values()) == {"length"} and len(harness.ended) == 300 and not harness.failures


def test_a_full_queue_refuses_a_group_whole_and_once() -> None:
    harness = Harness(max_queue=5, max_num_seqs=2)
    harness.mailbox.put(group_of(7))
    harness.turn()
    assert harness.scheduler.num_waiting == 5
    harness.mailbox.put(group_of(3, first=7))
    harness.mailbox.put(Submit(request_id="one", token_ids=[1], params=SamplingParams()))
    harness.turn()
    assert [(f.request_id, f.status, f.others) for f in harness.failures] == [
        ("g7", 503, ["g8", "g9"]),
        ("one", 503, []),
    ]
    assert "5 sequences are waiting, max_queue is 5" in harness.failures[0].message
    harness.run()
    assert sorted(harness.tokens) == [f"g{i}" for i in range(7)]


def test_a_queue_of_too_many_prompt_tokens_refuses_until_some_have_begun() -> None:
    harness = Harness(max_queue=50, max_queue_tokens=10, max_num_seqs=2)
    harness.mailbox.put(group_of(2, prompt=[1] * 30))  # runs, however long
    harness.turn()
    for first, size in ((2, 6), (3, 20), (4, 1)):
        harness.mailbox.put(group_of(1, prompt=[2] * size, first=first))
        harness.turn()
    assert [(failed.request_id, failed.status) for failed in harness.failures] == [("g4", 503)]  # g3 is let in whole
    assert "26 prompt tokens are waiting, max_queue_tokens is 10" in harness.failures[0].message
    harness.run()
    harness.mailbox.put(group_of(1, first=5))
    harness.run()
    assert sorted(harness.tokens) == ["g0", "g1", "g2", "g3", "g5"]


@pytest.mark.parametrize("limits", [{"max_queue": 1}, {"max_queue": 50, "max_queue_tokens": 5}])
def test_a_full_queue_takes_what_an_engine_before_had_admitted(limits: dict[str, int]) -> None:
    """That had computed part of it, which the new one has in its queue."""
    harness = Harness(max_num_seqs=1, **limits)
    for first in (0, 1, 2):
        harness.mailbox.put(msgspec.structs.replace(group_of(1, prompt=[1] * 30, first=first), taken=True))
    harness.mailbox.put(group_of(1, first=3))
    harness.run()
    assert [failed.request_id for failed in harness.failures] == ["g3"]
    assert sorted(harness.tokens) == ["g0", "g1", "g2"]


def test_a_full_queue_says_when_it_will_have_moved() -> None:
    """A turn lasts a second; sequences of three tokens end two in three seconds."""
    harness = Harness(max_queue=8, max_num_seqs=2)
    harness.mailbox.put(group_of(40))
    harness.turn()
    while harness.scheduler.num_waiting > 20:
        harness.turn()
    harness.mailbox.put(group_of(1, first=40))
    harness.turn()
    (refused,) = harness.failures
    assert refused.retry_after_s == pytest.approx(20 * 3 / 2, rel=0.2)


def test_a_burst_fills_slots_and_queue() -> None:
    """All of it comes with one poll, before any can start."""
    harness = Harness(max_queue=5, max_num_seqs=2)
    for number in range(8):
        harness.mailbox.put(Submit(request_id=f"r{number}", token_ids=[1], params=SamplingParams()))
    harness.turn()
    assert [failed.request_id for failed in harness.failures] == ["r7"]


def test_a_group_is_told_that_it_is_admitted_before_its_first_token() -> None:
    harness = Harness(max_queue=1, max_num_seqs=1)
    for first in (0, 2, 4):
        harness.mailbox.put(group_of(2, first=first))
        harness.engine.turn()
    messages = harness.mailbox.take()
    assert messages[0] == Admitted("g0") and isinstance(messages[-1], Tokens)
    assert [message.request_id for message in messages if isinstance(message, Admitted | Failed)] == ["g0", "g2", "g4"]
    assert sum(isinstance(message, Failed) for message in messages) == 2


@pytest.mark.parametrize("bad", ["id", "twice"])
def test_one_bad_sequence_refuses_its_group_before_any_runs(bad: str) -> None:
    harness = Harness()
    members = [Member("a", 0, SamplingParams()), Member("b", 0, SamplingParams())]
    members.append(Member("c", 1, SamplingParams()) if bad == "id" else Member("a", 0, SamplingParams()))
    harness.mailbox.put(SubmitGroup(prompts=[[1, 2], [VOCAB]], members=members))
    harness.engine.turn()
    (failed,) = harness.mailbox.take()
    assert (failed.status, len(failed.others)) == (400, 2) and failed.request_id == members[2].request_id
    assert not harness.scheduler.has_work and not harness.device.queries
    assert harness.metrics.render().count(b'finished_reason="abort",model_name="m"} 0.0') == 2
    harness.mailbox.inbox.append((CLIENT, group_of(2)))
    harness.run()
    assert len(harness.tokens) == 2


def eight(prompt_length: int = 9) -> list[Submit]:
    """Requests of which the one with seed 99 is poison to what a test breaks."""
    shared = [1, 2, 3, 4, 5, 6, 8, 9]
    return [
        Submit(
            request_id=str(i), token_ids=(shared + [i % VOCAB] * 20)[: prompt_length + i],
            params=SamplingParams(max_tokens=6 + i, seed=99 if i == 5 else i, ignore_eos=True, logprobs=None),
        )
        for i in range(8)
    ]  # fmt: skip


def served(harness: Harness, submits: list[Submit]) -> Harness:
    for submit in submits:
        harness.mailbox.put(submit)
    harness.run()
    assert harness.scheduler.block_tables.pool.num_free == harness.scheduler.block_tables.pool.num_blocks - 1, (
        "blocks are held by nobody"
    )
    return harness


def poison(harness: Harness, where: str, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """What has to do with the request of seed 99 raises, from its `after`th time on."""
    times = 0

    def raising(owner: object, name: str, takes_part: Callable[..., bool]) -> None:
        real = getattr(owner, name)

        def instead(*args: object, **named: object) -> object:
            nonlocal times
            if takes_part(*args, **named):
                times += 1
                if times > after:
                    raise OverflowError(f"in {name}")
            return real(*args, **named)

        monkeypatch.setattr(owner, name, instead)

    def has_seed(step: StepInput) -> bool:
        nonlocal times
        times += 99 in step.sampling.seeds.tolist()
        return 99 in step.sampling.seeds.tolist() and times > after

    def running(batch: InputBatch) -> bool:
        return any(sequence is not None and sequence.seed == 99 for sequence in batch.sequences)

    match where:
        case "find":
            raising(harness.scheduler.block_tables, "find", lambda sequence: sequence.seed == 99)
        case "enter":
            raising(harness.scheduler.batch, "_set_stop_ids", lambda slot, ids: harness.scheduler._starting.seed == 99)
        case "schedule":
            raising(harness.scheduler, "schedule", lambda *_: running(harness.scheduler.batch))
        case "draft_tokens":
            raising(harness.engine.drafter, "propose", lambda ahead: running(harness.scheduler.batch))
        case "pack":
            raising(
                Packer, "pack", lambda self, plan: bool((harness.scheduler.batch.sampling.seed[plan.slots] == 99).any())
            )
        case "launch":
            harness.device.refuses = has_seed
        case "wait":
            harness.device.breaks = has_seed
        case "commit":
            raising(results, "_logprobs", lambda sequence, *_: sequence.seed == 99)
        case "finish":
            raising(
                harness.scheduler,
                "_finish",
                lambda sequence: sequence.seed == 99 and sequence.finish_reason == "length",
            )


PLACES = ("find", "enter", "schedule", "pack", "launch", "wait", "commit")


@pytest.mark.parametrize("draft_tokens", ["", "host", "device"])
@pytest.mark.parametrize("setting", ["roomy", "without a cache", "short of blocks", "in chunks"])
@pytest.mark.parametrize("where", [*PLACES, "draft_tokens", "finish"])
def test_one_poisoned_request_of_eight_ends_alone(where: str, setting: str, draft_tokens: str, monkeypatch) -> None:
    if where == "draft_tokens" and not draft_tokens:
        pytest.skip("nothing is drafted")
    options = {
        "roomy": {}, "without a cache": dict(caching=False), "short of blocks": dict(num_blocks=16), "in chunks": dict(budget=8),
    }[setting]  # fmt: skip
    clean = served(Harness(draft_tokens=draft_tokens, max_queue=20, **options), eight())
    assert set(clean.ended.values()) == {"length"}
    for after in (0, 2):
        with monkeypatch.context() as patch:
            harness = Harness(draft_tokens=draft_tokens, max_queue=20, **options)
            poison(harness, where, patch, after)
            served(harness, eight())
        assert {key: tokens for key, tokens in harness.tokens.items() if key != "5"} == {
            key: tokens for key, tokens in clean.tokens.items() if key != "5"
        }
        own = harness.tokens.get("5", [])
        assert own == clean.tokens["5"][: len(own)], "nothing is told twice, nothing is left out"
        assert {**harness.ended, "5": ""} == {**clean.ended, "5": ""}
        # What goes wrong with its end goes wrong once it has been told, or never.
        assert harness.ended["5"] == "500" or (
            own == clean.tokens["5"] and (where in ("finish", "commit", "find", "enter"))
        )


def test_a_lone_request_that_fails_is_told_at_once(monkeypatch) -> None:
    harness = Harness()
    poison(harness, "launch", monkeypatch, 0)
    served(harness, [eight()[5]])
    assert harness.ended == {"5": "500"} and harness.turns < 4
    served(harness, [eight()[0]])
    assert harness.ended["0"] == "length"


def test_whose_end_fails_has_been_told_and_its_neighbour_is_not_blamed(monkeypatch) -> None:
    harness = Harness()
    poison(harness, "finish", monkeypatch, 0)
    served(harness, [eight()[5], eight()[6]])
    assert harness.ended == {"5": "length", "6": "length"} and harness.tokens == served(Harness(), eight()[5:7]).tokens


@pytest.mark.parametrize("poisoned", [False, True])
def test_an_abort_that_fails_ends_its_request_alone(poisoned: bool, monkeypatch) -> None:
    clean, harness = served(Harness(max_queue=20), eight()), Harness(max_queue=20)
    if poisoned:  # the others are being tried one at a time meanwhile
        poison(harness, "launch", monkeypatch, 0)
    for submit in eight():
        harness.mailbox.put(submit)
    for _ in range(4):
        harness.turn()
    finish = harness.scheduler._finish

    def fails(sequence: Sequence) -> None:
        finish(sequence)
        raise KeyError(sequence.request_id)

    with monkeypatch.context() as patch:
        patch.setattr(harness.scheduler, "_finish", fails)
        harness.mailbox.put(Abort("3"))
        harness.turn()
    harness.run()
    expected = {key: reason for key, reason in clean.ended.items() if key != "3"} | ({"5": "500"} if poisoned else {})
    assert harness.ended == expected


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_broken_device_ends_the_engine(where: str) -> None:
    harness = Harness()
    setattr(harness.device, "refuses" if where == "launch" else "breaks", lambda step: True)
    with pytest.raises(RuntimeError, match="a step failed, and 3 of one token after it"):
        served(harness, eight())


def test_many_poisoned_requests_in_a_slot_do_not_end_the_engine() -> None:
    harness = Harness(max_queue=50)
    harness.device.breaks = lambda step: bool((step.sampling.seeds >= 100).any())
    bad = [Submit(request_id=f"bad{i}", token_ids=[1], params=SamplingParams(seed=100 + i)) for i in range(12)]
    served(harness, [*bad, *eight()])
    assert all(harness.ended[submit.request_id] == "500" for submit in bad)
    assert all(harness.ended[str(i)] == "length" for i in range(8))


def test_company_that_fails_is_served_one_by_one() -> None:
    """No request is to blame for a step that no two of them come through."""
    clean = served(Harness(max_queue=20), eight())
    harness = Harness(max_queue=20)
    harness.device.breaks = lambda step: step.num_seqs > 1
    served(harness, eight())
    assert (harness.tokens, harness.ended) == (clean.tokens, clean.ended)


def test_a_message_that_cannot_be_sent_ends_its_request(monkeypatch) -> None:
    clean, harness = served(Harness(max_queue=20), eight()), Harness(max_queue=20)
    send = harness.mailbox.send

    def fails(client: bytes, message: object) -> None:
        if isinstance(message, Tokens) and any(delta.request_id == "3" for delta in message.each()):
            raise TypeError("cannot be encoded")
        send(client, message)

    monkeypatch.setattr(harness.mailbox, "send", fails)
    served(harness, eight())
    assert harness.ended == {**clean.ended, "3": "500"}
    assert {**harness.tokens, "3": []} == {**clean.tokens, "3": []}


@pytest.mark.parametrize("setting", ["roomy", "short of blocks", "in chunks"])
def test_prompt_tokens_are_those_of_usage(setting: str) -> None:
    """However often a prompt is computed, wherever its tokens come from, it counts once, and whole."""
    options = {"roomy": {}, "short of blocks": dict(num_blocks=16), "in chunks": dict(budget=8)}[setting]
    harness = Harness(max_queue=20, **options)
    submits = eight()
    served(harness, submits)
    again = [msgspec.structs.replace(submit, request_id=f"again {submit.request_id}") for submit in submits]
    served(harness, again)
    harness.mailbox.put(Submit(request_id="left", token_ids=[1] * 30, params=SamplingParams()))
    if setting == "in chunks":
        harness.turn()
    harness.mailbox.put(Abort("left"))
    harness.run()
    counted = {
        (sample.name, sample.labels.get("source", "")): sample.value
        for family in text_string_to_metric_families(harness.metrics.render().decode())
        for sample in family.samples
        if sample.name.startswith("vllm:") and "le" not in sample.labels and "finished_reason" not in sample.labels
    }
    prompt = 2 * sum(len(submit.token_ids) for submit in submits)
    generated = sum(map(len, harness.tokens.values()))
    assert counted["vllm:prompt_tokens_total", ""] == prompt
    assert counted["vllm:request_prompt_tokens_sum", ""] == prompt
    assert counted["vllm:generation_tokens_total", ""] == counted["vllm:request_generation_tokens_sum", ""] == generated
    assert counted["vllm:prompt_tokens_cached_total", ""] == harness.cached > 0
    assert counted["vllm:prompt_tokens_by_source_total", "local_compute"] == prompt - harness.cached
    assert counted["vllm:iteration_tokens_total_sum", ""] == prompt - harness.cached + generated
    assert (
        counted["vllm:time_to_first_token_seconds_count", ""]
        == counted["vllm:e2e_request_latency_seconds_count", ""]
        == 16
    )
    assert counted["vllm:num_preemptions_total", ""] > 0 or setting != "short of blocks"
    assert counted["vllm:prefix_cache_queries_total", ""] == prompt + 30 * (setting == "in chunks")


@settings(max_examples=40, deadline=None)
@given(
    faults=st.lists(
        st.tuples(st.integers(15, 60), st.sampled_from(["schedule", "pack", "launch", "wait", "commit"])),
        min_size=1,
        max_size=5,
    ),
    num_blocks=st.integers(12, 40),
    budget=st.integers(8, 40),
    caching=st.booleans(),
    draft_tokens=st.sampled_from(["", "host", "device"]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
)
def test_faults_of_any_step_end_every_request_once(faults, num_blocks, budget, caching, draft_tokens, lengths) -> None:
    submits = [
        Submit(request_id=str(i), token_ids=list(range(n % 7 + 1)) * 2, params=SamplingParams(max_tokens=n, seed=i))
        for i, n in enumerate(lengths)
    ]
    options = dict(num_blocks=num_blocks, budget=budget, caching=caching, draft_tokens=draft_tokens, max_queue=20)
    clean, harness = served(Harness(**options), submits), Harness(**options)
    calls, due = 0, deque(faults)

    def fault(where: str) -> bool:
        """Far enough from one another that one of three steps of the engine's own comes through."""
        nonlocal calls
        calls += 1
        if not due or calls < due[0][0] or where != due[0][1]:
            return False
        due.popleft()
        calls = 0
        return True

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, where in (
            (harness.scheduler, "schedule", "schedule"), (Packer, "pack", "pack"), (harness.device, "launch", "launch"),
            (Ticket, "wait", "wait"), (results, "_delta", "commit"),
        ):  # fmt: skip

            def instead(*args, real=getattr(owner, name), where=where, **named):
                if fault(where):
                    raise MemoryError(where)
                return real(*args, **named)

            patch.setattr(owner, name, instead)
        served(harness, submits)
    assert harness.ended.keys() == clean.ended.keys()
    for request_id, reason in harness.ended.items():
        own = harness.tokens.get(request_id, [])
        assert own == clean.tokens[request_id][: len(own)]
        assert reason == "500" or (reason, own) == (clean.ended[request_id], clean.tokens[request_id])


def test_an_engine_that_has_work_and_finishes_no_step_says_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    for _ in range(5):
        harness.turn()
    assert harness.engine.stalled_s == 0
    harness.mailbox.put(group_of(1))
    harness.turn()
    with monkeypatch.context() as patched:
        patched.setattr(harness.scheduler, "schedule", lambda *_: [])
        for _ in range(8):
            harness.turn()
    assert harness.engine.stalled_s >= 7
    harness.turn()  # launches
    harness.turn()  # and commits
    assert harness.engine.stalled_s <= 2
    harness.run()
    assert harness.engine.stalled_s == 0 and harness.ended == {"g0": "length"}


def test_the_loop_says_before_each_turn_how_long_it_expects_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.scheduler.chunk_limit = ChunkLimit(StepTime(), least=8)
    beats: list[float | None] = []
    harness.engine.beat = beats.append
    harness.turn()
    assert beats == [0.0]  # idle
    harness.mailbox.put(
        Submit(request_id="a", token_ids=[1, 2, 3], params=SamplingParams(max_tokens=20, ignore_eos=True))
    )
    harness.run()
    assert None in beats[:4]  # the first steps of a kind
    assert all(beat == pytest.approx(1.0, rel=0.5) for beat in beats[6:-3])  # a turn is a second
    harness.engine.use_idle_time = lambda: True
    beats.clear()
    harness.engine.turn(block=True)
    assert beats == [None, 0.0]  # what idle time is used for may take long
    beats.clear()
    poison(harness, "launch", monkeypatch, 0)
    harness.mailbox.put(eight()[5])
    harness.run()
    assert None in beats
