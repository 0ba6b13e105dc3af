"""The seam to the device: `CompiledStep.launch(StepInput) -> Ticket` is all that the engine sees.

A launch stages the step's metadata, runs the forward (a replayed CUDA graph, the compiled graph, or the
plain captured modules while compilation is under way), samples, and hands the ids to the next step on the
device. It does not wait: `Ticket.wait` does. A decode may be launched as a chain: several steps, each of which goes on from
what the one before drew. Knows nothing of requests, blocks or sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from pagegraph.compiler.host import step_thread
from pagegraph.compiler.inductor.compile import GraphPass, compile_forward
from pagegraph.compiler.model.capture import CapturedModel
from pagegraph.compiler.step.capture_sizes import Bucket, Ladder, own_bucket
from pagegraph.compiler.step.forward import mark_dynamic, run_forward, step_inputs
from pagegraph.compiler.step.graphs import Forward, GraphSet, Outputs, Pending
from pagegraph.compiler.step.inputs import LookedUp, StepInput, StepOutput
from pagegraph.compiler.step.sampling import StepLogprobTensors, draw, sample, settle
from pagegraph.compiler.step.staging import Packet, Staged, Staging
from pagegraph.compiler.step.state import DeviceState

# ids int64 [S] of the step's own sequences, of a chain [S, times]; where there are any, what was looked up int32 [2, S], logprobs
Finished = tuple[torch.Tensor, torch.Tensor | None, StepLogprobTensors | None]


class Ticket:
    """A launched step."""

    def __init__(self, result: Callable[[], StepOutput]) -> None:
        self._result = result

    def wait(self) -> StepOutput:
        """Block until the step's ids are on the host. Raises what the step raised."""
        return self._result()


@dataclass(slots=True)
class StepCounts:
    """Running totals over launched steps; `padding` are the tokens that buckets added to `tokens`."""

    steps: int = 0
    graphed: int = 0  # replayed as a CUDA graph
    tokens: int = 0
    padding: int = 0

    def launched(self, tokens: int, padded: int, graphed: bool) -> None:
        self.steps += 1
        self.graphed += graphed
        self.tokens += tokens
        self.padding += padded - tokens


class CompiledStep:
    """Runs steps in order on one device."""

    def __init__(
        self,
        captured: CapturedModel,
        state: DeviceState,
        staging: Staging,
        ladder: Ladder | None,
        graph_passes: Sequence[GraphPass] = (),
    ) -> None:
        self.captured = captured
        self.state = state
        self.staging = staging
        self.ladder = ladder
        self.graph_passes = graph_passes
        self.forward: Callable[..., torch.Tensor] = captured
        self.counts = StepCounts()
        self.graphs = GraphSet() if staging.device.type == "cuda" else None
        self.pending = Pending()  # rungs to be captured between steps
        self._returns = torch.cuda.Stream() if staging.device.type == "cuda" else None
        self._returned: torch.cuda.Event | None = None  # the last step's ids are copied out of their buffer

    def launch(self, step: StepInput, times: int = 1) -> Ticket:
        """Start one step; steps run in the order of their launch.

        `times` > 1: a chain of so many steps. `step` is the first, one token of each of several rows, all of them sampled; the
        others go on from what was drawn. Every row has blocks for all of it. The ids are [S, times].
        """
        if self.graphs is None:  # on another thread: the engine's loop goes on meanwhile, as it does beside a GPU
            return Ticket(step_thread.submit(self._run_cpu, step, times).result)
        return self._launch_cuda(step, times)

    def compiled_forward(self, warm: list[StepInput], progress: bool = False) -> Callable[..., torch.Tensor]:
        """The forward compiled on the given steps, to be swapped in as `forward`; safe beside launches.

        `warm` must touch the null block and the scrap row only.
        """
        forward = compile_forward(self.captured, self.graph_passes)
        with torch.inference_mode():
            for step in tqdm(warm, desc="compile", unit="graph", disable=not progress):
                staged = self.staging.unpack(self.staging.send(step, own_bucket(step.num_tokens, step.num_seqs)))
                inputs = step_inputs(staged)
                mark_dynamic(*inputs)
                forward(*inputs, self.state.key_caches, self.state.value_caches)
        return forward

    def capture_graphs(self, buckets: Sequence[Bucket], progress: bool) -> None:
        """CUDA: capture these rungs of the ladder; a step may be in flight."""

        def forward_of(bucket: Bucket) -> Forward:
            packet = self.staging.placeholder(bucket)
            return lambda: self._forward_and_draw(packet, bucket.times)

        with torch.inference_mode():
            self.graphs.capture(buckets, forward_of, progress)
        for bucket in buckets:
            self.pending.done(bucket)

    def use_idle_time(self) -> bool:
        """Do a piece of what was put off at the start -> whether there was any: on CUDA, capture one more rung."""
        bucket = self.pending.next()
        if bucket is not None:
            self.capture_graphs([bucket], progress=False)
        return bucket is not None

    def close(self) -> None:
        """Finish launched steps."""
        if self.graphs is None:
            step_thread.rest()

    @torch.inference_mode()
    def _run_cpu(self, step: StepInput, times: int) -> StepOutput:
        bucket = own_bucket(step.num_tokens, step.num_seqs)
        self.counts.launched(step.num_tokens * times, bucket.tokens * times, graphed=False)
        packet = self.staging.send(step, bucket, times)
        return _output(step, *self._over(packet, times, lambda: self._finish(step, *self._forward_and_draw(packet))))

    def _forward_and_draw(self, packet: Packet, times: int = 1) -> Outputs:
        """The padded step's own work, `times` over: all that a CUDA graph holds."""
        before = []
        for _ in range(times - 1):
            before.append(
                self._forward_and_draw(packet)[1]
            )  # the ids alone: what else there was makes room for the next
            self.staging.go_on(packet)
        staged = self.staging.unpack(packet)
        logits = run_forward(self.forward, staged, self.state)
        ids = draw(logits, staged, self.state)
        found = settle(ids, staged, self.state)
        return logits, torch.stack([*before, ids], dim=1) if before else ids, found, staged

    def _over(self, packet: Packet, times: int, run: Callable[[], Finished]) -> Finished:
        """What comes of it if `run` takes the packet so often, each time a token further; of several the ids alone."""
        if times == 1:
            return run()
        drawn = []
        for _ in range(times):
            drawn.append(run()[0].clone())
            self.staging.go_on(packet)
        return torch.stack(drawn, dim=1), None, None

    def _finish(
        self, step: StepInput, logits: torch.Tensor, ids: torch.Tensor, found: torch.Tensor | None, staged: Staged
    ) -> Finished:
        """What the step's own sequences get: ids of the forward where they will do."""
        if step.sampling.is_plain:
            return ids[: step.num_seqs], None if found is None else found[:, : step.num_seqs], None
        ids, logprobs = sample(logits[: step.num_seqs], step.sampling, staged, self.state)
        return ids, settle(ids, staged, self.state), logprobs

    @torch.inference_mode()
    def _launch_cuda(self, step: StepInput, times: int) -> Ticket:
        rung = self._rung(step)
        bucket = rung or Bucket(step.num_tokens, self.ladder.max_num_seqs)  # the kernels of the largest rung
        if times > 1 and rung and step.sampling.is_plain:
            rung = self._chain(rung, times)
        packet = self.staging.send(step, bucket, times)
        if self._returned is not None:
            torch.cuda.current_stream().wait_event(self._returned)
        self.counts.launched(step.num_tokens * times, bucket.tokens * times, rung in self.graphs)

        def run() -> Finished:
            replayed = self.graphs.replay(rung) if rung else None
            return self._finish(step, *(replayed or self._forward_and_draw(packet)))

        return Ticket(self._returning(step, *self._over(packet, times // (rung or bucket).times, run)))

    def _rung(self, step: StepInput) -> Bucket | None:
        """The rung that the step runs in: its own, or a larger one while that is not captured; None beyond the ladder."""
        rung = self.ladder.bucket(step.num_tokens, step.num_seqs)
        if rung not in self.pending:
            return rung
        if self.pending.want(rung):
            self.capture_graphs([rung], progress=False)
            return rung
        return self.graphs.holding(rung)

    def _chain(self, rung: Bucket, times: int) -> Bucket:
        """The chain of so many steps of the rung if it is captured, or due by now; else the rung."""
        chain = replace(rung, times=times)
        if chain not in self.graphs and self.pending.want(chain):
            self.capture_graphs([chain], progress=False)
        return chain if chain in self.graphs else rung

    def _returning(
        self, step: StepInput, ids: torch.Tensor, found: torch.Tensor | None, logprobs: StepLogprobTensors | None
    ) -> Callable[[], StepOutput]:
        """Send ids to the host on a second stream; the main one goes on."""
        self._returns.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._returns):
            host, found_host = _sent_back(ids), None if found is None else _sent_back(found)
            arrived = self._returned = torch.cuda.Event()
            arrived.record()

        def result() -> StepOutput:
            arrived.synchronize()
            return _output(step, host, found_host, logprobs)

        return result


def _sent_back(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which the current stream fills."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    tensor.record_stream(torch.cuda.current_stream())
    return host


def _output(
    step: StepInput, ids: torch.Tensor, found: torch.Tensor | None, logprobs: StepLogprobTensors | None
) -> StepOutput:
    lookup = None
    if found is not None:
        matches, fed = found.numpy()
        lookup = LookedUp(matches >> 1, matches & 1 if step.sampling.is_plain else None, fed)
    return StepOutput(ids.int().numpy(), logprobs.numpy() if logprobs else None, lookup)
