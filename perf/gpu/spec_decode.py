"""Drafting on a GPU: what a step with draft tokens costs, and what drafting brings on texts that repeat and on random ones.

`speculation` replays the decode graphs of one model; `texts` runs SmolLM2's real weights (--weights) through the engine;
`chains` times how a small model makes draft tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pagegraph.compiler.build import BuiltModel, build_compiled, build_model
from pagegraph.compiler.step.capture_queue import CaptureQueue
from pagegraph.compiler.step.cpu_runner import CpuRunner
from pagegraph.compiler.step.graphs import GraphSet
from pagegraph.compiler.step.inputs import SamplingInput, StepInput
from pagegraph.compiler.step.step import CompiledStep
from pagegraph.runtime.config import Config, load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM
from perf import texts as work
from perf.floors import Shape
from perf.gpu.engine_steps import _profile, _replayed
from perf.gpu.offline import built_of, ceilings_of, config_of, step_of
from perf.gpu.report import Report

BATCHES, TINY_BATCHES = (1, 4, 16, 32), (1, 2)
NUM_DRAFT_TOKENS = (0, 2, 4, 7)
KEYS, TINY_KEYS = 1024, 64  # of each sequence
STREAMS = (1, 4, 16)
ROUNDS = 3
REQUESTS = 4  # a stream
METHODS = ("ngram", "suffix")
CHAINED_SEQS, CHAINED_DRAFTS, CHAINED_ROUNDS, TINY_ROUNDS = (1, 4, 16), (4, 8), 50, 2


def speculation(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Milliseconds of a decode step with k draft tokens a sequence, to its floor and to the step without draft tokens.

    The floor reads weights and each sequence's keys and values once, however many draft tokens there are.
    """
    config, built = built_of(shared)
    shape, ceilings = Shape.of(args.models[0]), ceilings_of(report, args, shared)
    keys = TINY_KEYS if args.tiny else KEYS
    for seqs in TINY_BATCHES if args.tiny else BATCHES:
        alone = None
        for draft_tokens in NUM_DRAFT_TOKENS:
            if seqs * (1 + draft_tokens) > config.max_num_seqs or report.out_of_time((seqs, draft_tokens)):
                break
            ms = 1e3 * _replayed(built, _step(seqs, draft_tokens, keys, built, config))
            alone = alone or ms
            counts, lengths = np.full(seqs, 1 + draft_tokens), np.full(seqs, keys + draft_tokens)
            floor = 1e3 * shape.step_floor(ceilings, np.concatenate([[0], np.cumsum(counts)]), lengths)
            report.row(
                seqs=seqs, draft_tokens=draft_tokens, keys=keys, ms=ms, floor_ms=floor, ratio=ms / floor, to_none=ms / alone,
                pays_from=(ms / alone - 1) / draft_tokens if draft_tokens else 0.0,
            )  # fmt: skip


def _step(seqs: int, draft_tokens: int, keys: int, built: BuiltModel, config: Config) -> StepInput:
    """Entries of `seqs` sequences on random blocks, the first of each at position keys - 1."""
    rng, each = np.random.default_rng(seqs), 1 + draft_tokens
    used = -(-(keys + draft_tokens) // config.block_size)
    owners = np.repeat(np.arange(seqs), used)
    chosen = rng.permutation(built.num_blocks - 1)[: len(owners)] + 1
    entries = seqs * each
    return StepInput(
        token_ids=rng.integers(0, built.vocab_size, entries, dtype=np.int32),
        slots=np.repeat(np.arange(seqs, dtype=np.int32), each),
        query_start=np.arange(entries + 1, dtype=np.int32),
        starts=np.tile(np.arange(keys - 1, keys + draft_tokens, dtype=np.int32), seqs),
        sampled=np.zeros(entries, bool),
        new_blocks=np.stack([owners, np.tile(np.arange(used), seqs), chosen], axis=1).astype(np.int32),
        sampling=SamplingInput(np.zeros(entries, np.float32), np.zeros(entries, np.int64)),
    )


def texts(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Tokens a second with as many draft tokens as pay against none, same texts, sides alternating; medians.

    `streams` requests run at a time, and several times as many are asked for: where some rows draft well and others not,
    those that are done make room. First, tokens in float32 with draft tokens against those without.
    """
    _equal(report, args)
    num_tokens = 32 if args.tiny else 192
    settings = dict(
        dtype="bfloat16", device=args.device, max_model_len=2048, num_blocks=4096, compile=not args.no_compile
    )
    most = load_config(args.weights, {**settings, "speculative_method": METHODS[0], "max_num_seqs": 64}).config
    built = build_compiled(compiler_options(most), progress=False)
    for method in METHODS:
        for streams in STREAMS:
            given = {**settings, "speculative_method": method, "max_num_seqs": streams}
            llm = LLM(load_config(args.weights, given).config, built=built)
            for kind in ("repetitive", "random"):
                if report.out_of_time((method, kind, streams)):
                    return
                _compare(report, llm, method, kind, streams, num_tokens)
        costs = llm.engine.drafter.costs
        report.fact(
            **{f"{method}_costs_ms": dict(zip(costs.step_sizes.tolist(), costs.ms(costs.step_sizes).round(3).tolist()))}
        )
    if (
        built.device.type == "cuda"
    ):  # what looking up and accepting take of a step without draft tokens; last, as it leaves hooks
        _profile(report, built, _step(16, 0, KEYS, built, llm.config))
    built.close()


def _equal(report: Report, args: argparse.Namespace) -> None:
    """Greedy float32 tokens with draft tokens that the device looks up, as many as pay and four always, against none."""
    from tests.prompts import PROMPTS

    settings = dict(
        dtype="float32", device=args.device, max_model_len=1024, max_num_seqs=16, num_blocks=1024, compile=False
    )
    prompts, params = (
        PROMPTS[:4] if args.tiny else PROMPTS,
        SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True),
    )
    built = build_compiled(
        compiler_options(load_config(args.weights, {**settings, "speculative_method": "ngram"}).config), progress=False
    )
    expected = None
    for draft_tokens in (None, "auto", 4):
        given = {**settings, "speculative_method": "ngram", "num_speculative_tokens": draft_tokens or "auto"}
        llm = LLM(load_config(args.weights, given).config, built=built)
        if draft_tokens is None:
            llm.engine.drafter = None
        got = [one.token_ids for one in llm.generate(prompts, params)]
        expected = expected or got
        same, counters = sum(a == b for a, b in zip(got, expected)), llm.engine.scheduler.counters
        report.row(
            float32=str(draft_tokens),
            prompts=len(prompts),
            same=same,
            draft_tokens=counters.draft_tokens,
            accepted=counters.accepted,
        )
        if same < len(prompts):
            report.failure(
                f"{len(prompts) - same} of {len(prompts)} prompts differ in float32 with {draft_tokens} draft tokens"
            )
    built.close()


def _compare(report: Report, llm: LLM, method: str, kind: str, streams: int, num_tokens: int) -> None:
    engine, drafter = llm.engine, llm.engine.drafter
    requests = REQUESTS * streams
    if kind == "repetitive":
        prompts = work.repetitive(llm.tokenizer.encode, requests)
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    else:
        prompts = work.random(requests)
        params = SamplingParams(max_tokens=num_tokens, temperature=1.0, ignore_eos=True, seed=streams)

    def seconds(drafting: bool) -> tuple[float, list[list[int]]]:
        engine.drafter = drafter if drafting else None  # one engine: the same blocks and caches on both sides
        start = time.perf_counter()
        done = [one.token_ids for one in llm.generate(prompts, params)]
        return time.perf_counter() - start, done

    _, expected = seconds(False)
    _, got = seconds(True)
    counters = engine.scheduler.counters
    before = counters.draft_tokens, counters.accepted
    runs = [(seconds(False)[0], seconds(True)[0]) for _ in range(ROUNDS)]
    off, on = (statistics.median(side) for side in zip(*runs))
    tokens = len(prompts) * num_tokens
    report.row(
        method=method, text=kind, streams=streams, off_tok_s=tokens / off, on_tok_s=tokens / on, ratio=off / on,
        draft_tokens=(counters.draft_tokens - before[0]) / ROUNDS, accepted=(counters.accepted - before[1]) / ROUNDS,
        same=sum(a == b for a, b in zip(got, expected)) / len(expected),
    )  # fmt: skip


def chains(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Milliseconds until k tokens of each sequence are on the host, as a small model proposes them: by k launches, by one that
    replays the step's graph k times, and by one graph of all; medians, the ways alternating on the same blocks.

    All three have to give the same tokens. The model has the 0.6B shape; only the graphs in use are captured.
    """
    keys, most = TINY_KEYS if args.tiny else KEYS, max(CHAINED_DRAFTS)
    begin = time.perf_counter()
    settings = dict(max_num_seqs=max(CHAINED_SEQS), max_num_batched_tokens=512, num_blocks=2048, max_model_len=2048)
    config = config_of(args, "tiny" if args.tiny else "0.6b", **settings)
    built = build_model(compiler_options(config), progress=False)
    if config.compile:
        built.compile()
    for cache in (*built.step.state.caches.key_caches, *built.step.state.caches.value_caches):
        cache.normal_()
    report.fact(start_s=time.perf_counter() - begin, phases_s=built.timings.seconds)
    for seqs in CHAINED_SEQS:
        one = step_of(
            np.random.default_rng(seqs), np.ones(seqs), np.full(seqs, keys + most),
            vocab_size=built.vocab_size, num_blocks=built.num_blocks, block_size=config.block_size,
        )  # fmt: skip
        one.starts -= most
        for draft_tokens in CHAINED_DRAFTS:
            if report.out_of_time((seqs, draft_tokens)):
                return
            ways = _ways(built.step, one, draft_tokens)
            tokens = {name: way() for name, way in ways.items()}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(TINY_ROUNDS if args.tiny else CHAINED_ROUNDS):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - begin)
            ms = {f"{name}_ms": 1e3 * statistics.median(each) for name, each in seconds.items()}
            same = all(np.array_equal(each, tokens["launches"]) for each in tokens.values())
            report.row(
                seqs=seqs, draft_tokens=draft_tokens, **ms, ratio=ms["launches_ms"] / list(ms.values())[-1], same=same
            )
            if not same:
                report.failure(f"{draft_tokens} draft tokens of {seqs} sequences differ: {tokens}")
    built.close()


def _ways(step: CompiledStep, one: StepInput, draft_tokens: int) -> dict[str, Callable[[], np.ndarray]]:
    """Each gives the tokens [S, draft tokens] behind the decode step `one`."""
    on_device = np.full_like(one.token_ids, -1)
    onward = [
        replace(one, token_ids=on_device, new_blocks=one.new_blocks[:0], starts=one.starts + at)
        for at in range(1, draft_tokens)
    ]

    def launches() -> np.ndarray:
        tickets = [step.launch(each) for each in (one, *onward)]
        return np.stack([ticket.wait().token_ids for ticket in tickets], axis=1)

    def chain() -> np.ndarray:
        return step.launch(one, draft_tokens).wait().token_ids

    if isinstance(step.runner, CpuRunner):
        return {"launches": launches, "replays": chain}
    bucket = step.runner.capture_sizes.bucket(one.num_tokens, one.num_seqs)
    step.runner.queue = CaptureQueue()  # nobody else captures
    without, whole = GraphSet(), GraphSet()
    for graphs, buckets in ((without, [bucket]), (whole, [bucket, replace(bucket, num_steps=draft_tokens)])):
        step.runner.graphs = graphs
        step.runner.capture_graphs(buckets, progress=False)

    def on(graphs: GraphSet, way: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            step.runner.graphs = graphs
            return way()

        return run

    return {"launches": on(without, launches), "replays": on(without, chain), "graph": on(whole, chain)}
