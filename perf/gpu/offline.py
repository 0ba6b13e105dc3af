"""An engine driven in this process by token ids, and steps made by hand: what the sections measure with.

`runtime.llm.LLM` is the same engine with a tokenizer around it; dummy models have none. Knows no section.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.step.counts import StepCounts
from pagegraph.compiler.step.inputs import Deferred, SamplingInput, StepInput, StepOutput
from pagegraph.compiler.step.state import DeviceState
from pagegraph.compiler.step.step import CompiledStep, Ticket
from pagegraph.runtime.bench.work import draw_ids
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.assemble import engine_of
from pagegraph.runtime.ipc.protocol import SamplingParams, Submit, TokenLogprob, Tokens
from pagegraph.runtime.llm import LocalMailbox
from perf.floors import MAX_MODEL_LEN, MODELS, PUBLISHED, Ceilings, Shape, write_model
from perf.gpu.report import Report


@dataclasses.dataclass(slots=True)
class Turn:
    """One turn of the loop. Times in seconds; `wait` is for the step before, `launch` of this one's."""

    seconds: float = 0.0
    launch: float = 0.0
    wait: float = 0.0
    query_start: np.ndarray | None = None  # of the step launched, if one was
    seq_lens: np.ndarray | None = None

    @property
    def host(self) -> float:
        return self.seconds - self.wait

    @property
    def num_decodes(self) -> int:
        """Sequences of a step that only decodes, else 0."""
        if self.seq_lens is None or int(self.query_start[-1]) != len(self.seq_lens):
            return 0
        return len(self.seq_lens)


class WatchedStep:
    """Stands where the engine expects its step; times launches and waits into the turn of the moment."""

    def __init__(self, step: CompiledStep) -> None:
        self.step = step
        self.turn = Turn()

    @property
    def counts(self) -> StepCounts:
        return self.step.counts

    @property
    def state(self) -> DeviceState:
        return self.step.state

    def use_idle_time(self) -> bool:
        return self.step.use_idle_time()

    def launch(self, step: StepInput) -> Ticket:
        start = time.perf_counter()
        ticket = self.step.launch(step)
        self.turn.launch = time.perf_counter() - start
        self.turn.query_start, self.turn.seq_lens = step.query_start, step.seq_lens

        def wait() -> StepOutput:
            start = time.perf_counter()
            output = ticket.wait()
            self.turn.wait = time.perf_counter() - start
            return output

        timed = Deferred(wait)
        return (
            Ticket(timed) if ticket.masks is None else Ticket(None, ticket.masks, lambda: (ticket.sample(), timed)[1])
        )


@dataclasses.dataclass(slots=True)
class Run:
    """What a batch of requests became."""

    seconds: float
    outputs: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    turns: list[Turn]
    graph_hits: int
    first_token_s: list[float]  # of each request, from its arrival

    @property
    def steps(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.seq_lens is not None]


class Offline:
    """An engine of its own, with an empty pool, over a built model."""

    def __init__(self, config: Config, built: BuiltModel) -> None:
        self.mailbox = LocalMailbox()
        self.watched = WatchedStep(built.step)
        self.engine, _ = engine_of(config, dataclasses.replace(built, step=self.watched), self.mailbox)

    def run(
        self,
        prompts: list[list[int]],
        lengths: list[int],
        each: Sequence[Mapping[str, object]] | None = None,
        arrivals: Sequence[float] | None = None,
        **params: object,
    ) -> Run:
        """All requests at once, or each at its second of `arrivals`, which ascend; greedy unless `params` say otherwise, or
        those of `each`; exact output lengths.

        Raises RuntimeError if a request fails.
        """
        given = {"temperature": 0.0, "ignore_eos": True, **params}
        own = each or [{}] * len(prompts)
        requests = [
            Submit(
                request_id=str(i), token_ids=prompt, params=SamplingParams(max_tokens=length, **given | dict(own[i]))
            )
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        outputs: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[TokenLogprob]] = [[] for _ in prompts]
        turns: list[Turn] = []
        first_token_s = [0.0] * len(prompts)
        hits = graph_hits(self.watched.step)
        waiting = collections.deque(zip(arrivals or [0.0] * len(requests), requests))
        begin = time.perf_counter()
        while waiting or self.mailbox.inbox or not self.engine.idle:
            while waiting and waiting[0][0] <= time.perf_counter() - begin:
                self.mailbox.put(waiting.popleft()[1])
            if self.engine.idle and not self.mailbox.inbox:
                continue  # nobody has come yet
            turn = self.watched.turn = Turn()
            start = time.perf_counter()
            self.engine.turn()
            turn.seconds = time.perf_counter() - start
            turns.append(turn)
            for message in self.mailbox.take():
                if not isinstance(message, Tokens):
                    raise RuntimeError(f"a request failed: {message}")
                for delta in message.each():
                    index = int(delta.request_id)
                    arrived = arrivals[index] if arrivals else 0.0
                    first_token_s[index] = first_token_s[index] or time.perf_counter() - begin - arrived
                    outputs[index] += delta.token_ids
                    logprobs[index] += delta.logprobs or ()
        seconds = time.perf_counter() - begin
        if wrong := [i for i, (got, length) in enumerate(zip(outputs, lengths)) if len(got) != length]:
            raise RuntimeError(
                f"{len(wrong)} requests have not their length, the first {wrong[0]}: {len(outputs[wrong[0]])}"
            )
        return Run(seconds, outputs, logprobs, turns, graph_hits(self.watched.step) - hits, first_token_s)


def graph_hits(step: CompiledStep) -> int:
    return step.counts.graphed


def config_of(args: argparse.Namespace, model: str, **changed: object) -> Config:
    """The configuration that every section starts from."""
    if args.checkpoint:
        from perf.gpu.checkpoints import write_checkpoint

        folder = write_checkpoint(model, args.device)
    else:
        folder = write_model(model, Path(tempfile.gettempdir(), "pagegraph-models", model))
    settings = dict(
        model=str(folder), load_format="auto" if args.checkpoint else "dummy", dtype=str(MODELS[model]["dtype"]), device=args.device,
        max_model_len=MAX_MODEL_LEN[model], max_num_seqs=256, max_queue=100_000, enable_prefix_caching=False,
        inter_token_target_ms="none",  # as `LLM` has it
        compile=not args.no_compile, quantization=args.quantization, kv_cache_memory=1 << 28 if args.device == "cpu" else None,
    )  # fmt: skip
    if args.tiny:
        settings.update(max_num_seqs=16, max_num_batched_tokens=512)
    return Config(**{**settings, **changed})


def method_of(args: argparse.Namespace, model: str) -> str | None:
    """How weights are stored, a key of `perf.floors.WEIGHT_BYTES`."""
    return args.quantization or (PUBLISHED.get(model) if args.checkpoint else None)


def built_of(shared: dict) -> tuple[Config, BuiltModel]:
    """What section `start` of this process has built."""
    if "built" not in shared:
        raise RuntimeError("no engine: section start failed")
    return shared["built"]


def ceilings_of(report: Report, args: argparse.Namespace, shared: dict) -> Ceilings:
    """The device's ceilings, measured once a process; made up without a device."""
    if "ceilings" not in shared:
        from perf.gpu.report import ceilings

        shared["ceilings"] = ceilings() if args.device == "cuda" else Ceilings(10e9, 100e9)
    found = shared["ceilings"]
    report.fact(copy_TB_s=found.bandwidth / 1e12, matmul_TFLOP_s=found.flops / 1e12)
    return found


def step_of(
    rng: np.random.Generator,
    rows: np.ndarray,
    lengths: np.ndarray,
    *,
    vocab_size: int,
    num_blocks: int,
    block_size: int,
) -> StepInput:
    """A greedy step: sequence s computes the last rows[s] of its lengths[s] tokens, on random blocks of its own."""
    rows, lengths = np.asarray(rows, np.int32), np.asarray(lengths, np.int32)
    used = -(-lengths // block_size)
    if used.sum() > num_blocks - 1:
        raise ValueError(f"a step of {used.sum()} blocks in a pool of {num_blocks}")
    start = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    owners, seqs = np.repeat(np.arange(len(used)), used), len(rows)
    index = np.arange(len(owners)) - np.repeat(np.cumsum(used) - used, used)
    blocks = rng.permutation(num_blocks - 1)[: len(owners)] + 1
    return StepInput(
        token_ids=rng.integers(0, vocab_size, start[-1], dtype=np.int32),
        slots=np.arange(seqs, dtype=np.int32),
        query_start=start,
        starts=lengths - rows,
        sampled=np.ones(seqs, bool),
        new_blocks=np.stack([owners, index, blocks], axis=1).astype(np.int32),
        sampling=SamplingInput(temperature=np.zeros(seqs, np.float32), seeds=np.zeros(seqs, np.int64)),
    )


def random_prompts(seed: int, sizes: list[int], vocab_size: int) -> list[list[int]]:
    return draw_ids(np.random.default_rng(seed), sizes, vocab_size)


def floor_seconds(run: Run, shape: Shape, ceilings: Ceilings, method: str | None, ranks: int = 1) -> float:
    """The least time of the run's own steps, weights quantised by `method`, shared by so many ranks."""
    return sum(shape.step_floor(ceilings, turn.query_start, turn.seq_lens, method, ranks=ranks) for turn in run.steps)
