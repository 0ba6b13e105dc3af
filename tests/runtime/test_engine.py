"""The engine's loop over a step without a model: what is admitted, and what an exception costs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compiler.step import StepCounts, Ticket
from compiler.step_input import StepInput, StepOutput
from runtime.blocks import BlockPool
from runtime.engine import Engine, Limits
from runtime.llm import CLIENT, LocalMailbox
from runtime.metrics import EngineMetrics
from runtime.protocol import Admitted, Failed, Member, SamplingParams, Submit, SubmitGroup, Tokens
from runtime.recorder import Recorder
from runtime.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).parent))
from fake_step import BLOCK, EOS, MAX_LEN, VOCAB, FakeStep  # noqa: E402


class Device(FakeStep):
    """The fake step behind the engine's seam: it runs at the launch, and what it raises, waiting raises."""

    def launch(self, step: StepInput) -> Ticket:
        output: StepOutput | Exception
        try:
            output = self.run(step)
        except Exception as error:
            output = error

        def wait() -> StepOutput:
            if isinstance(output, Exception):
                raise output
            return output

        return Ticket(wait)


class Harness:
    """An engine, and what it said of each request."""

    def __init__(self, *, num_blocks: int = 60, max_num_seqs: int = 8, budget: int = 32, max_queue: int = 5) -> None:
        self.device = Device(num_blocks, max_num_seqs)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, BLOCK), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=MAX_LEN
        )
        self.mailbox = LocalMailbox()
        self.metrics = EngineMetrics("m", MAX_LEN)
        self.turns = 0
        self.engine = Engine(
            self.device, self.scheduler, self.mailbox, Limits(VOCAB, MAX_LEN, frozenset([EOS]), max_queue), None,
            lambda: float(self.turns), Recorder(self.metrics, self.scheduler, StepCounts()),
        )  # fmt: skip
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}  # finish reason, or the status of a failure
        self.failures: list[Failed] = []

    def turn(self) -> None:
        self.engine.turn()
        self.turns += 1
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
    assert [(f.request_id, f.status, f.others) for f in harness.failures] == [("g7", 503, ["g8", "g9"]), ("one", 503, [])]
    assert "5 sequences are waiting, max_queue is 5" in harness.failures[0].message
    harness.run()
    assert sorted(harness.tokens) == [f"g{i}" for i in range(7)]


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
    assert not harness.scheduler.has_work and not harness.device.steps
    assert harness.metrics.render().count(b'finished_reason="abort",model_name="m"} 0.0') == 2
    harness.mailbox.inbox.append((CLIENT, group_of(2)))
    harness.run()
    assert len(harness.tokens) == 2
