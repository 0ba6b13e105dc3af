"""Steps on a CPU: one after the other on the step thread, so that the engine's loop runs on, as beside a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from pagegraph.compiler.host import step_thread
from pagegraph.compiler.step.bitmask import Bitmask, BitmaskBuffers
from pagegraph.compiler.step.capture_sizes import Bucket, own_bucket
from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.executor import Outputs, StepExecutor
from pagegraph.compiler.step.inputs import Pending, StepInput, StepOutput
from pagegraph.compiler.step.staging import StepMetadata


class CpuRunner:
    """Each step runs in its own size."""

    def __init__(self, executor: StepExecutor, counts: StepCounts) -> None:
        self._executor = executor
        self._counts = counts
        self._bitmasks = BitmaskBuffers(executor.state.vocab_size, executor.staging.device)

    def launch(self, step: StepInput, num_steps: int) -> Pending:
        """Submit a step, or `num_steps` of them in a row -> what comes of it."""
        return step_thread.submit(self._run, step, num_steps)

    def launch_masked(self, step: StepInput) -> tuple[np.ndarray, Callable[[], Pending]]:
        """Submit a step up to its logits -> masks to be written, and what samples by them and returns as `launch`.

        Sampling is submitted by itself, so no thread waits for masks.
        """
        assert step.sampling.masked is not None
        outputs = step_thread.submit(self._forward, step)
        bitmask = self._bitmasks.take(step.sampling.masked)
        return bitmask.words.numpy(), lambda: step_thread.submit(self._sample, step, outputs, bitmask)

    def put_off(self) -> None:
        """Nothing is put off on a CPU."""

    def capture_graphs(self, buckets: Sequence[Bucket], progress: bool) -> None:
        """A CPU has no such graphs."""
        raise RuntimeError("CUDA graphs were asked for on a CPU")

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        """Sizes up to `most` that differ in what a decode step takes: nearly every one."""
        return (*range(1, min(most, 16) + 1), *range(20, most + 1, 4))

    def close(self) -> None:
        """Finish launched steps."""
        step_thread.rest()

    @torch.inference_mode()
    def _run(self, step: StepInput, num_steps: int) -> StepOutput:
        executor, metadata = self._executor, self._send(step, num_steps)
        sampled = executor.repeat(metadata, num_steps, lambda: executor.finish(step, executor.run(metadata)))
        return sampled.output(step)

    @torch.inference_mode()
    def _forward(self, step: StepInput) -> Outputs:
        return self._executor.run(self._send(step, 1))

    @torch.inference_mode()
    def _sample(self, step: StepInput, outputs: Future[Outputs], bitmask: Bitmask) -> StepOutput:
        return self._executor.finish(step, outputs.result(), bitmask).output(step)

    def _send(self, step: StepInput, num_steps: int) -> StepMetadata:
        bucket = own_bucket(step.num_tokens, step.num_seqs, self._executor.deterministic)
        self._counts.launched(step.num_tokens * num_steps, bucket.tokens * num_steps, graphed=False)
        return self._executor.staging.send(step, bucket, num_steps)
