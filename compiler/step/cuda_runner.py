"""Steps on a GPU: captured graphs replayed on the current stream, sampled ids copied to the host on a second one.

Knows which graph a step replays and when a missing one is captured; knows no requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pagegraph.compiler.step.bitmask import BitmaskBuffers
from pagegraph.compiler.step.capture_queue import CaptureQueue
from pagegraph.compiler.step.capture_sizes import Bucket, CaptureSizes
from pagegraph.compiler.step.counts import GraphMiss, StepCounts
from pagegraph.compiler.step.executor import Outputs, Sampled, StepExecutor
from pagegraph.compiler.step.graphs import GraphSet, MaskedSampling
from pagegraph.compiler.step.inputs import Pending, StepInput, StepOutput
from pagegraph.compiler.step.staging import StepMetadata

POLL_S = 2e-5  # between looks at a device


class _Returning:
    """A Pending of ids that are on their way to the host."""

    def __init__(self, arrived: torch.cuda.Event, output: Callable[[], StepOutput]) -> None:
        self._arrived = arrived
        self._output = output

    def result(self, timeout: float | None = None) -> StepOutput:
        if timeout is None:
            self._arrived.synchronize()
        else:
            end = time.monotonic() + timeout
            while not self._arrived.query():
                if time.monotonic() > end:
                    raise TimeoutError
                time.sleep(POLL_S)
        return self._output()

    def done(self) -> bool:
        return self._arrived.query()


class _Prepared(NamedTuple):
    """A step whose metadata is sent."""

    metadata: StepMetadata
    bucket: Bucket  # of its graph, which may run several steps; without one, what it is padded to
    graphed: bool


class CudaRunner:
    """Pads each step to a capture size; a step larger than all of them runs without a graph."""

    def __init__(self, executor: StepExecutor, capture_sizes: CaptureSizes, counts: StepCounts) -> None:
        self.capture_sizes = capture_sizes
        self.graphs = GraphSet()
        self.queue = CaptureQueue()  # buckets to be captured between steps
        self._executor = executor
        self._counts = counts
        self._masked = MaskedSampling()
        self._bitmasks = BitmaskBuffers(executor.state.vocab_size, executor.staging.device)
        self._returns = torch.cuda.Stream()
        self._returned: torch.cuda.Event | None = None  # recorded when the last step's ids are copied

    @torch.inference_mode()
    def launch(self, step: StepInput, num_steps: int) -> Pending:
        """Launch a step, or `num_steps` of them in a row -> what comes of it."""
        executor, prepared = self._executor, self._prepare(step, num_steps)
        times = num_steps // prepared.bucket.num_steps
        sampled = executor.repeat(prepared.metadata, times, lambda: executor.finish(step, self._forward(prepared)))
        return self._returning(step, sampled)

    @torch.inference_mode()
    def launch_masked(self, step: StepInput) -> tuple[np.ndarray, Callable[[], Pending]]:
        """Launch a step up to its logits -> masks to be written, and what samples by them and returns as `launch`.

        The ids that the graph samples stay where the masks allow them; nothing else may be launched in between.
        """
        assert step.sampling.masked is not None
        executor, prepared = self._executor, self._prepare(step, 1)
        outputs, bucket = self._forward(prepared), prepared.bucket
        bitmask = self._bitmasks.take(step.sampling.masked, padded_to=bucket.seqs)

        @torch.inference_mode()
        def sample() -> Pending:
            sent = self._bitmasks.send(bitmask)
            if prepared.graphed and step.sampling.is_plain_but_masked and step.prompt is None:
                padded = self._bitmasks.padded(bucket.seqs)
                sampled = self._masked.run(bucket, outputs, padded, lambda: executor.resample(outputs, padded))
                return self._returning(step, sampled.of(step.num_seqs))
            return self._returning(step, executor.finish(step, outputs, sent))

        return bitmask.words.numpy(), sample

    def _prepare(self, step: StepInput, num_steps: int) -> _Prepared:
        graph = self._padded_bucket(step)
        # No graph: run at its own token count, padded to max sequences so that it picks the same kernels as the largest
        # bucket.
        bucket = graph or Bucket(step.num_tokens, self.capture_sizes.max_decode_tokens)
        if num_steps > 1 and graph and step.sampling.is_plain:
            graph = self._draft_graph(graph, num_steps)
        metadata = self._executor.staging.send(step, bucket, num_steps)
        if self._returned is not None:
            torch.cuda.current_stream().wait_event(self._returned)
        graphed = graph is not None and graph in self.graphs
        self._counts.launched(step.num_tokens * num_steps, bucket.tokens * num_steps, graphed)
        if not graphed:
            self._counts.missed_graph(self._graph_miss(step))
        return _Prepared(metadata, graph or bucket, graphed)

    def _forward(self, prepared: _Prepared) -> Outputs:
        """Replay the step's graph, or launch what it would hold."""
        outputs = self.graphs.replay(prepared.bucket) if prepared.graphed else None
        return self._executor.run(prepared.metadata) if outputs is None else outputs

    def capture_graphs(self, buckets: Sequence[Bucket], progress: bool) -> None:
        """Capture these buckets; a step may be in flight."""
        executor = self._executor

        def forward_of(bucket: Bucket) -> Callable[[], Outputs]:
            metadata = executor.staging.placeholder(bucket)
            return lambda: executor.run(metadata, bucket.num_steps)

        with torch.inference_mode():
            self.graphs.capture(buckets, forward_of, progress)
        for bucket in buckets:
            self.queue.done(bucket)

    def put_off(self) -> Bucket | None:
        """The bucket that is to be captured next, when nothing runs."""
        return self.queue.next()

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        """Sizes up to `most` that differ in what a decode step takes: the capture sizes."""
        return tuple(size for size in self.capture_sizes.decode if size <= most)

    def close(self) -> None:
        """Wait for what is launched, then destroy the graphs."""
        torch.cuda.synchronize()
        self.graphs.close()
        self._masked.close()

    def _padded_bucket(self, step: StepInput) -> Bucket | None:
        """The bucket that the step is padded to: its own, or a larger captured one while its own is in the queue.

        None if the step is larger than every bucket, or its own is in the queue and no larger one is captured.
        """
        bucket = self.capture_sizes.bucket(step.num_tokens, step.num_seqs)
        if bucket is None or bucket not in self.queue:
            return bucket
        if self.queue.want(bucket):
            self.capture_graphs([bucket], progress=False)
            return bucket
        return self.graphs.holding(bucket)

    def _graph_miss(self, step: StepInput) -> GraphMiss:
        """Why the step replays no graph."""
        own = self.capture_sizes.bucket(step.num_tokens, step.num_seqs)
        return "too_many_tokens" if own is None else "not_captured"

    def _draft_graph(self, bucket: Bucket, num_steps: int) -> Bucket:
        """The draft graph of so many steps of the bucket, if it is captured or is to be now; else the bucket."""
        draft = replace(bucket, num_steps=num_steps)
        if draft not in self.graphs and self.queue.want(draft):
            self.capture_graphs([draft], progress=False)
        return draft if draft in self.graphs else bucket

    def _returning(self, step: StepInput, sampled: Sampled) -> Pending:
        """Send ids to the host on a second stream; the main one goes on."""
        self._returns.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._returns):
            ids = _sent_back(sampled.ids)
            found = None if sampled.found is None else _sent_back(sampled.found)
            prompt = None if sampled.prompt is None else sampled.prompt.map(_sent_back)
            arrived = self._returned = torch.cuda.Event()
            arrived.record()

        return _Returning(arrived, lambda: Sampled(ids, found, sampled.logprobs, prompt).output(step))


def _sent_back(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which the current stream fills."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    tensor.record_stream(torch.cuda.current_stream())
    return host
