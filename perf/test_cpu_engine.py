"""The engine against transformers on this machine's CPU, bfloat16, one real model; gates are ratios of the same run.

Each case alternates the two sides and compares medians. Run with `make perf`; figures that are kept go to
perf/results/ by `make perf ARGS="--benchmark-json perf/results/NAME.json"`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pagegraph.compiler.build import build_compiled
from pagegraph.compiler.host import step_thread
from pagegraph.runtime.bench.work import draw_ids
from pagegraph.runtime.config import Config, load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM
from perf import peers
from perf.gates import Gate
from tests.prompts import PROMPTS

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDS = 3

pytestmark = pytest.mark.timeout(1800)  # the slow side of a case takes minutes


def config_of(**overrides: object) -> Config:
    settings = dict(dtype="bfloat16", device="cpu", max_model_len=2048, kv_cache_memory="512MiB", max_num_seqs=32)
    return load_config(MODEL, {**settings, **overrides}).config


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(config_of(), built=build_compiled(compiler_options(config_of()), progress=False))


@pytest.fixture(scope="module")
def peer(llm: LLM) -> torch.nn.Module:
    return peers.load(llm.built.folder, "cpu", "bfloat16", dummy=False)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def peer_generate(model: torch.nn.Module, prompts: list[list[int]], num_tokens: int) -> None:
    """One static batch, to `num_tokens` outputs each."""
    step_thread.rest()  # or its threads would not let the peer's stay awake
    peers.generate(model, prompts, num_tokens)


def ratio(benchmark, ours: Callable[[], object], theirs: Callable[[], object], gate: Gate, pairs: int = ROUNDS) -> None:
    """Theirs / ours in median seconds must pass the gate; sides alternate, so drift hits both. None: nothing is recorded."""
    ours(), theirs()
    mine, others = [], []
    for _ in range(pairs):
        for run, seconds in ((ours, mine), (theirs, others)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    reached = statistics.median(others) / statistics.median(mine)
    if benchmark is not None:
        benchmark.pedantic(ours, rounds=1)
        benchmark.extra_info.update(
            ratio=round(reached, 3),
            ours_s=mine,
            theirs_s=others,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )
    gate.check(reached)


def mixed_work(llm: LLM) -> tuple[list[list[int]], list[int]]:
    """16 requests: prompts of 5 to 70 tokens, outputs of 16 to 96."""
    prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS[:16]]
    return prompts, [16 + (index * 37) % 81 for index in range(16)]


def test_one_stream(benchmark, gate: Gate, llm: LLM, peer) -> None:
    ids = llm.tokenizer.encode(PROMPTS[1])
    ratio(benchmark, lambda: llm.generate([ids], greedy(64)), lambda: peer_generate(peer, [ids], 64), gate)


@pytest.mark.parametrize("streams", [8, 32])
def test_equal_streams(benchmark, gate: Gate, llm: LLM, peer, streams: int) -> None:
    """Prompts and answers of one length, which is what a static batch is best at."""
    prompts = draw_ids(np.random.default_rng(streams), [32] * streams, 40000)
    ratio(benchmark, lambda: llm.generate(prompts, greedy(48)), lambda: peer_generate(peer, prompts, 48), gate)


def test_mixed_requests_against_a_static_batch(benchmark, gate: Gate, llm: LLM, peer) -> None:
    prompts, lengths = mixed_work(llm)
    ratio(
        benchmark,
        lambda: llm.generate(prompts, [greedy(n) for n in lengths]),
        lambda: peer_generate(peer, prompts, max(lengths)),
        gate,
    )


def test_mixed_requests_against_one_by_one(benchmark, gate: Gate, llm: LLM, peer) -> None:
    prompts, lengths = mixed_work(llm)
    ratio(
        benchmark,
        lambda: llm.generate(prompts, [greedy(n) for n in lengths]),
        lambda: [peer_generate(peer, [p], n) for p, n in zip(prompts, lengths)],
        gate,
    )


def test_prefix_hit_against_cold(benchmark, gate: Gate, llm: LLM) -> None:
    """500 shared tokens and 100 own: time to first token on a hit is at most 35 % of cold."""
    text = llm.tokenizer.encode(" ".join(PROMPTS) * 4)
    shared, turn = text[:500], iter(range(10**6))

    def own() -> list[int]:
        return [(7 * next(turn) + 11 * i) % 40000 + 100 for i in range(100)]

    def cold() -> None:
        llm.generate([own()[:50] + shared[50:] + own()], greedy(1))

    llm.generate([shared + own()], greedy(1))
    ratio(benchmark, lambda: llm.generate([shared + own()], greedy(1)), cold, gate)


def test_chunked_prefill_keeps_streams_going(benchmark, gate: Gate, llm: LLM) -> None:
    """Beside a prompt of 1,500 tokens, the worst gap of a running stream is shorter chunked than whole."""

    def worst_gap(chunk: int) -> float:
        runner = LLM(config_of(max_num_batched_tokens=chunk, enable_prefix_caching=False), built=llm.built)
        long = (llm.tokenizer.encode(" ".join(PROMPTS)) * 8)[:1500]
        gaps: list[float] = []
        stream = runner.stream(PROMPTS[0], greedy(48))
        next(stream)
        runner._start([long], [greedy(1)], None)
        last = time.perf_counter()
        for _ in stream:
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
        return max(gaps)

    worst_gap(64)
    whole = statistics.median(worst_gap(2048) for _ in range(ROUNDS))
    chunked = statistics.median(worst_gap(64) for _ in range(ROUNDS))
    benchmark.pedantic(lambda: worst_gap(64), rounds=1)
    benchmark.extra_info.update(ratio=round(whole / chunked, 3), whole_s=whole, chunked_s=chunked)
    gate.check(whole / chunked)
