"""The seam to the device: `CompiledStep.launch(StepInput) -> Ticket` is all that the engine sees.

A launch stages the step's metadata, runs the forward (a replayed CUDA graph, the compiled graph, or the
uncompiled modules while a CPU's compilation is under way), samples, and hands the ids to the next step on the
device. It does not wait: `Ticket.wait` does. A decode may be launched several times in a row, each step with
the token that the one before sampled. Knows nothing of requests, blocks or sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from pagegraph.compiler.inductor.compile import GraphPass, Took, compile_forward, untold
from pagegraph.compiler.inductor.guard_free import Forward
from pagegraph.compiler.inductor.stored_forward import ForwardStore
from pagegraph.compiler.model.paged import Forwarded, PagedModel
from pagegraph.compiler.step.capture_sizes import Bucket, CaptureSizes, own_bucket
from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.cpu_runner import CpuRunner
from pagegraph.compiler.step.cuda_runner import CudaRunner
from pagegraph.compiler.step.executor import StepExecutor
from pagegraph.compiler.step.forward import mark_dynamic, step_inputs
from pagegraph.compiler.step.inputs import Pending, StepInput, StepOutput
from pagegraph.compiler.step.staging import Staging
from pagegraph.compiler.step.state import DeviceState

R = TypeVar("R")


class RanksLost(RuntimeError):
    """A rank that shares the model has failed or ended: no step can be launched any more."""


class Lead(Protocol):
    """The other ranks that share the model: whatever this one launches, they launch too."""

    def launch(self, step: StepInput, num_steps: int) -> None:
        """Raises RanksLost."""
        ...

    def sample(self, masks: np.ndarray) -> None:
        """Of the step launched last. Raises RanksLost."""
        ...

    def capture(self, bucket: Bucket) -> None:
        """A CUDA graph, which holds sums over ranks. Raises RanksLost."""
        ...

    def wait(self, pending: Pending) -> StepOutput:
        """The output of a step that was launched, or what it raised. Raises RanksLost where that does not come."""
        ...

    def lost(self, error: Exception) -> RanksLost:
        """What a step that raised `error` here means: the ranks are no longer at the same place."""
        ...


class _Led:
    """A Pending of a step that other ranks launch too."""

    def __init__(self, lead: Lead, pending: Pending) -> None:
        self._lead = lead
        self._pending = pending

    def result(self, timeout: float | None = None) -> StepOutput:
        return _together(self._lead, lambda: self._lead.wait(self._pending))

    def done(self) -> bool:
        return self._pending.done()


def _together(lead: Lead, call: Callable[[], R]) -> R:
    """What all ranks do: nothing that fails on one of them alone can be made good."""
    try:
        return call()
    except Exception as error:
        raise lead.lost(error) from error


class Ticket:
    """A launched step. One with masked rows samples when `masks` are filled and `sample` is called, before the next
    launch; if that never comes, nothing waits for it.
    """

    def __init__(
        self,
        pending: Pending | None,
        masks: np.ndarray | None = None,
        sample: Callable[[], Pending] | None = None,
    ) -> None:
        self.masks = masks  # int32 [R, words], of the rows `SamplingInput.masked`, all to be written
        self._pending = pending
        self._sample = sample

    def sample(self) -> None:
        """Sample by the masks."""
        if self._sample is None:
            raise RuntimeError("a step without masked rows was asked to sample by its masks")
        self._pending = self._sample()

    def wait(self) -> StepOutput:
        """Block until the step's ids are on the host. Raises what the step raised."""
        if self._pending is None:
            raise RuntimeError("a step with masked rows was waited for before it sampled")
        return self._pending.result()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._pending is not None and self._pending.done()


class CompiledStep:
    """Runs steps in order on one device."""

    def __init__(
        self,
        paged_model: PagedModel,
        state: DeviceState,
        staging: Staging,
        capture_sizes: CaptureSizes | None,
        graph_passes: Sequence[GraphPass] = (),
    ) -> None:
        """capture_sizes: of CUDA graphs; None on a CPU."""
        self.paged_model = paged_model
        self.state = state
        self.staging = staging
        self.counts = StepCounts()
        self.lead: Lead | None = None  # of a model that ranks share, on the rank that others follow
        self._graph_passes = graph_passes
        self._executor = StepExecutor(paged_model, state, staging)
        self.runner: CudaRunner | CpuRunner
        if capture_sizes is not None:
            self.runner = CudaRunner(self._executor, capture_sizes, self.counts)
        else:
            self.runner = CpuRunner(self._executor, self.counts)

    @property
    def forward(self) -> Callable[..., Forwarded]:
        """What steps run: the modules, or what they were compiled to; may be swapped beside launches."""
        return self._executor.forward

    @forward.setter
    def forward(self, forward: Callable[..., Forwarded]) -> None:
        self._executor.forward = forward

    def launch(self, step: StepInput, num_steps: int = 1) -> Ticket:
        """Start one step; steps run in the order of their launch.

        `num_steps` > 1: so many steps in a row. `step` is the first, one token of each of several slots, all of them
        sampled; the others take the token sampled before. Every slot has blocks for all of it. The ids are [S, num_steps].
        """
        if step.sampling.masked is not None and num_steps != 1:
            raise ValueError("steps in a row sample without masks")
        if self.lead is not None:
            return self._launch_leading(self.lead, step, num_steps)
        if step.sampling.masked is None:
            return Ticket(self.runner.launch(step, num_steps))
        return Ticket(None, *self.runner.launch_masked(step))

    def _launch_leading(self, lead: Lead, step: StepInput, num_steps: int) -> Ticket:
        """The same, on all ranks."""
        lead.launch(step, num_steps)
        if step.sampling.masked is None:
            return Ticket(_Led(lead, _together(lead, lambda: self.runner.launch(step, num_steps))))
        masks, sample = _together(lead, lambda: self.runner.launch_masked(step))

        def sample_all() -> Pending:
            lead.sample(masks)
            return _Led(lead, _together(lead, sample))

        return Ticket(None, masks, sample_all)

    def compiled_forward(
        self, warm: list[StepInput], progress: bool = False, store: ForwardStore | None = None, took: Took = untold
    ) -> Forward:
        """The forward compiled on the given steps, or taken from `store`, to be swapped in as `forward`.

        Safe beside launches. `warm` must touch the null block and the dummy slot only.
        """
        forward = compile_forward(self.paged_model, self._graph_passes, took=took)
        caches = self.state.caches
        restored = store is not None and store.restore(forward, caches)
        with torch.inference_mode():
            for step in tqdm(warm, desc="compile", unit="graph", disable=not progress):
                bucket = own_bucket(step.num_tokens, step.num_seqs, self.paged_model.deterministic)
                staged = self.staging.unpack(self.staging.send(step, bucket))
                inputs = step_inputs(staged)
                mark_dynamic(*inputs)
                forward(*inputs, *caches)
        if store is not None and not restored:
            store.store(forward)
        return forward

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        """Sizes of decode steps, up to `most`, that differ in what they take."""
        return self.runner.decode_sizes(most)

    def use_idle_time(self) -> bool:
        """Do a piece of what was put off at the start, a CUDA graph, on all ranks -> whether there was any."""
        bucket = self.runner.put_off()
        if bucket is None:
            return False
        if self.lead is None:
            self.capture(bucket)
        else:
            self.lead.capture(bucket)
            _together(self.lead, lambda: self.capture(bucket))
        return True

    def capture(self, bucket: Bucket) -> None:
        """Capture one CUDA graph; a step may be in flight."""
        self.runner.capture_graphs([bucket], progress=False)

    def close(self) -> None:
        """Finish launched steps."""
        self.runner.close()
