"""Which steps replay a graph, and what is counted of those that do not; streams and graphs are stand-ins."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pagegraph.compiler.step import cuda_runner
from pagegraph.compiler.step.capture_queue import CaptureQueue
from pagegraph.compiler.step.capture_sizes import Bucket, cuda_capture_sizes
from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.cuda_runner import CudaRunner

SIZES = cuda_capture_sizes(16, 64)


class Executor:
    """Notes what steps are padded to; a step's result is the graph it replayed, or "run"."""

    def __init__(self) -> None:
        self.staging, self.padded = self, []
        self.state, self.device = SimpleNamespace(vocab_size=300), torch.device("cpu")

    def send(self, step: SimpleNamespace, bucket: Bucket, num_steps: int) -> None:
        self.padded.append(bucket)

    def run(self, metadata: None) -> str:
        return "run"

    def finish(self, step: SimpleNamespace, outputs: object) -> object:
        return outputs

    def repeat(self, metadata: None, num_steps: int, run) -> list:
        return [run() for _ in range(num_steps)]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CudaRunner:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(cuda_runner.CudaRunner, "_returning", lambda self, step, sampled: sampled)
    return CudaRunner(Executor(), SIZES, StepCounts())


def hold(runner: CudaRunner, *buckets: Bucket) -> None:
    for bucket in buckets:
        runner.graphs._graphs[bucket] = (SimpleNamespace(replay=lambda: None), bucket)


def step(tokens: int, seqs: int) -> SimpleNamespace:
    return SimpleNamespace(num_tokens=tokens, num_seqs=seqs, sampling=SimpleNamespace(is_plain=True))


def test_a_step_beyond_every_size_has_too_many_tokens(runner: CudaRunner) -> None:
    hold(runner, *SIZES.buckets())
    assert runner.launch(step(65, 3), 1) == ["run"]
    assert runner._executor.padded == [Bucket(65, 16)]
    assert runner._counts.graph_misses == {"too_many_tokens": 1, "not_captured": 0}


def test_a_step_whose_graph_waits_replays_a_larger_one_if_there_is_one(runner: CudaRunner) -> None:
    runner.queue = CaptureQueue(SIZES.buckets())
    assert runner.launch(step(3, 3), 1) == ["run"] and runner._executor.padded == [Bucket(3, 16)]
    assert runner._counts.graph_misses == {"too_many_tokens": 0, "not_captured": 1}
    hold(runner, Bucket(8, 8))
    assert runner.launch(step(3, 3), 1) == [Bucket(8, 8)]
    assert (runner._counts.graphed, runner._counts.graph_misses["not_captured"]) == (1, 1)


def test_without_any_graph_a_step_is_padded_to_its_size_and_not_captured(runner: CudaRunner) -> None:
    assert runner.launch(step(3, 3), 1) == ["run"] and runner._executor.padded == [Bucket(4, 4)]
    assert runner._counts.graph_misses == {"too_many_tokens": 0, "not_captured": 1}


def test_draft_steps_replay_their_graph_once_or_that_of_one_step_often(runner: CudaRunner) -> None:
    hold(runner, one := Bucket(4, 4))
    assert runner.launch(step(3, 3), 3) == [one] * 3
    hold(runner, draft := replace(one, num_steps=3))
    assert runner.launch(step(3, 3), 3) == [draft]
    assert runner._counts.graphed == runner._counts.steps == 2 and not any(runner._counts.graph_misses.values())
