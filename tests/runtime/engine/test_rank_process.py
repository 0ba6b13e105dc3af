"""What ranks do in step with the first, with stand-ins for steps and devices: launches, captures of CUDA graphs, waiting."""

from __future__ import annotations

import queue
import random
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagegraph.compiler.step import cuda_runner
from pagegraph.compiler.step.capture_queue import CaptureQueue
from pagegraph.compiler.step.capture_sizes import Bucket, cuda_capture_sizes
from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.cuda_runner import CudaRunner
from pagegraph.compiler.step.inputs import Deferred
from pagegraph.compiler.step.step import CompiledStep, RanksLost, Ticket
from pagegraph.kernels.collective import groups
from pagegraph.runtime.engine import ranks
from pagegraph.runtime.engine.rank_process import follow
from pagegraph.runtime.engine.ranks import Followers

SIZES = cuda_capture_sizes(16, 64)


class Done(Exception):
    """The last message is reached."""


class Steps:
    """Of a model; tells of what it is asked, and gives tickets that are done when a test says so."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.pending: list[Future] = []

    def launch(self, step: object, num_steps: int) -> Ticket:
        if step == "last":
            raise Done
        self.asked.append((step, num_steps))
        self.pending.append(Future())
        return Ticket(self.pending[-1])

    def capture(self, bucket: Bucket) -> None:
        self.asked.append(bucket)


def messages_of(*given: tuple[Any, ...]) -> queue.SimpleQueue:
    messages: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    for one in given:
        messages.put(one)
    return messages


def test_a_rank_launches_behind_steps_that_have_not_ended() -> None:
    steps = Steps()
    with pytest.raises(Done):
        follow(SimpleNamespace(steps=[steps]), messages_of(  # type: ignore[arg-type]
            ("launch", 0, "a", 1), ("launch", 0, "b", 2), ("capture", 0, Bucket(2, 2)), ("launch", 0, "c", 1), ("launch", 0, "last", 1)
        ))  # fmt: skip
    assert steps.asked == [("a", 1), ("b", 2), Bucket(2, 2), ("c", 1)]
    assert not any(one.done() for one in steps.pending)


def test_a_step_that_fails_later_ends_the_rank_without_another_message() -> None:
    steps = Steps()
    failing = threading.Thread(target=lambda: (_until(lambda: steps.pending), steps.pending[0].set_exception(Done())))
    failing.start()
    with pytest.raises(Done):
        follow(SimpleNamespace(steps=[steps]), messages_of(("launch", 0, "a", 1)))  # type: ignore[arg-type]
    failing.join()


def _until(found: Any) -> None:
    while not found():
        threading.Event().wait(0.001)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> tuple[CompiledStep, list[Bucket]]:
    """A step over a runner whose captures and launches are noted and nothing else."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(cuda_runner.CudaRunner, "_returning", lambda self, step, sampled: Deferred(lambda: sampled))
    staging = SimpleNamespace(device=torch.device("cpu"), send=lambda *given: None, placeholder=lambda bucket: None)
    executor: Any = SimpleNamespace(
        state=SimpleNamespace(vocab_size=300), staging=staging, run=lambda *given: None,
        finish=lambda step, outputs: outputs, repeat=lambda metadata, times, run: [run() for _ in range(times)],
    )  # fmt: skip
    runner = CudaRunner(executor, SIZES, StepCounts())
    captured: list[Bucket] = []

    def capture(buckets: list[Bucket], forward_of: object, progress: bool) -> None:
        captured.extend(buckets)
        runner.graphs._graphs.update({one: (SimpleNamespace(replay=lambda: None), one) for one in buckets})  # type: ignore[misc]

    monkeypatch.setattr(runner.graphs, "capture", capture)
    step = CompiledStep.__new__(CompiledStep)
    step.runner, step.lead = runner, None
    return step, captured


class Lead:
    """Puts messages where another rank finds them."""

    def __init__(self) -> None:
        self.messages = messages_of()

    def launch(self, step: object, num_steps: int) -> None:
        self.messages.put(("launch", 0, step, num_steps))

    def capture(self, bucket: Bucket) -> None:
        self.messages.put(("capture", 0, bucket))

    def sample(self, masks: object) -> None:
        raise AssertionError

    def wait(self, pending: Any) -> Any:
        return pending.result()

    def lost(self, error: Exception) -> RanksLost:
        return RanksLost(str(error))


def test_all_ranks_capture_the_same_graphs_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late ones too: those wanted often, those of draft steps, those of idle time, whatever order an earlier start has left."""
    first, by_first = stand_in(monkeypatch)
    other, by_other = stand_in(monkeypatch)
    buckets, rng = SIZES.buckets(), random.Random(0)
    first.runner.queue = CaptureQueue(buckets, buckets[::-1])  # type: ignore[union-attr]
    other.runner.queue = CaptureQueue(buckets)  # type: ignore[union-attr]
    for one in (first, other):
        one.runner.capture_graphs(SIZES.first(), progress=False)
    begun = len(by_first)
    lead = Lead()
    first.lead = lead  # type: ignore[assignment]
    for turn in range(1500):
        tokens = rng.choice((3, 3, 3, 12, 30))
        plain = SimpleNamespace(is_plain=True, masked=None)
        step: Any = SimpleNamespace(num_tokens=tokens, num_seqs=min(tokens, 16), sampling=plain)
        first.launch(step, 3 if tokens == 3 and turn % 2 else 1).wait()
        if turn % 400 == 399:
            assert first.use_idle_time()
    lead.messages.put(("launch", 0, "last", 1))
    monkeypatch.setattr(other, "launch", _ending(other.launch))
    with pytest.raises(Done):
        follow(SimpleNamespace(steps=[other]), lead.messages)  # type: ignore[arg-type]
    assert by_other == by_first
    assert {one.num_steps for one in by_first[begun:]} == {1, 3} and len(by_first) > begun + 4


def _ending(launch: Any) -> Any:
    def until_last(step: Any, num_steps: int) -> Ticket:
        if step == "last":
            raise Done
        return launch(step, num_steps)

    return until_last


def waiting(timeout_s: float) -> Followers:
    """Followers without processes."""
    followers = Followers.__new__(Followers)
    followers._group = SimpleNamespace(timeout_s=timeout_s, raises=False, abort=lambda: None)  # type: ignore[assignment]
    followers._ended, followers._told, followers._lost = threading.Event(), [], None
    followers._others, followers._size, followers._stopping = [], 2, False
    return followers


def test_a_step_that_never_ends_is_waited_for_no_longer_than_ranks_may_be_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where a sum without one of its ranks raises nothing."""
    monkeypatch.setattr(ranks, "TOLD_S", 0.01)
    with pytest.raises(
        RanksLost, match=r"did not answer in time \(a step has not ended in 0.1 s\); tensor_parallel_size=2 needs"
    ):
        waiting(0.1).wait(Future())


def test_a_rank_that_ends_is_told_of_while_a_step_is_waited_for() -> None:
    followers = waiting(1000)
    followers._told.append("rank 1 of 2 ended with status 1: no memory")
    followers._ended.set()
    with pytest.raises(RanksLost, match="rank 1 of 2 ended with status 1: no memory; tensor_parallel_size=2 needs"):
        followers.wait(Future())


def test_a_rank_without_memory_is_named() -> None:
    told = str(waiting(1000).lost(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert (
        told.startswith("rank 0 of 2: the device has too little memory for this model")
        and "Tried to allocate 2 GiB" in told
    )


def test_what_a_step_raises_is_not_taken_for_a_lack_of_time() -> None:
    failed: Future = Future()
    failed.set_exception(TimeoutError("of the step's own"))
    with pytest.raises(TimeoutError, match="of the step's own"):
        waiting(1000).wait(failed)


def test_closing_a_group_waits_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's end of a group returns when no graph holds a call of it: never, where one is left."""
    begun, left = threading.Event(), threading.Event()
    monkeypatch.setattr(groups, "CLOSE_S", 0.1)
    processes = SimpleNamespace(abort=lambda: (begun.set(), left.wait()))
    groups.Group(processes, 1.0, host=object()).close()
    assert begun.is_set()
    left.set()
