"""Steps on a CPU: one after the other on the step thread, so that the engine's loop runs on, as beside a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pagegraph.compiler.host import step_thread
from pagegraph.compiler.step.capture_sizes import own_bucket
from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.executor import StepExecutor
from pagegraph.compiler.step.inputs import StepInput, StepOutput


class CpuRunner:
    """Each step runs in its own size."""

    def __init__(self, executor: StepExecutor, counts: StepCounts) -> None:
        self._executor = executor
        self._counts = counts

    def launch(self, step: StepInput, num_steps: int) -> Callable[[], StepOutput]:
        """Submit a step, or `num_steps` of them in a row -> a function that waits for what comes of it."""
        return step_thread.submit(self._run, step, num_steps).result

    def use_idle_time(self) -> bool:
        """Nothing is put off on a CPU."""
        return False

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        """Sizes up to `most` that differ in what a decode step takes: nearly every one."""
        return (*range(1, min(most, 16) + 1), *range(20, most + 1, 4))

    def close(self) -> None:
        """Finish launched steps."""
        step_thread.rest()

    @torch.inference_mode()
    def _run(self, step: StepInput, num_steps: int) -> StepOutput:
        executor, bucket = self._executor, own_bucket(step.num_tokens, step.num_seqs)
        self._counts.launched(step.num_tokens * num_steps, bucket.tokens * num_steps, graphed=False)
        metadata = executor.staging.send(step, bucket, num_steps)
        sampled = executor.repeat(metadata, num_steps, lambda: executor.finish(step, executor.run(metadata)))
        return sampled.output(step)
