"""Drafting by the n-gram proposer, as much as pays, against none: tokens a second on texts that repeat and on random ones.

bfloat16 on this machine's CPU; sides alternate in one run, and the median of their ratios counts. Run with `make perf`.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from pagegraph.compiler.step.state import NgramRange
from pagegraph.runtime.config import Config, load_config
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM
from perf import texts
from perf.gates import Gate

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
# (rounds, tokens a stream): neighbours in time differ by a twentieth, so what should be equal is compared in many short runs.
SIZES = {"repetitive": (3, 96), "random": (45, 32)}

pytestmark = pytest.mark.timeout(1800)


def config_of(**overrides: object) -> Config:
    settings = dict(dtype="bfloat16", device="cpu", max_model_len=2048, kv_cache_memory="512MiB", max_num_seqs=64)
    return load_config(MODEL, {**settings, **overrides}).config


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(config_of(speculative_method="ngram"), progress=False)


def work_of(llm: LLM, kind: str, streams: int) -> tuple[list[list[list[int]]], SamplingParams]:
    """(prompts that run together, one set after the other; parameters). A single stream takes text after text."""
    if kind == "random":
        return [texts.random(streams)], SamplingParams(
            max_tokens=SIZES[kind][1], temperature=1.0, ignore_eos=True, seed=streams
        )
    greedy = SamplingParams(max_tokens=SIZES[kind][1], temperature=0.0, ignore_eos=True)
    if streams == 1:
        return [[prompt] for prompt in texts.repetitive(llm.tokenizer.encode, len(texts.NAMES))], greedy
    return [texts.repetitive(llm.tokenizer.encode, streams)], greedy


@pytest.mark.parametrize(
    ("kind", "streams"), [(kind, streams) for kind in ("repetitive", "random") for streams in (1, 4, 16)]
)
def test_drafting(benchmark, gate: Gate, llm: LLM, kind: str, streams: int) -> None:
    works, params = work_of(llm, kind, streams)
    engine, drafter, state = llm.engine, llm.engine.drafter, llm.built.step.state
    allowed = 15, NgramRange(2, 5)

    def seconds(drafting: bool) -> float:
        # One engine: the same blocks and caches on both sides. Steps look up nothing where nothing is drafted.
        engine.drafter = drafter if drafting else None
        state.allow_drafts(*(allowed if drafting else (0, None)))
        start = time.perf_counter()
        for work in works:
            llm.generate(work, params)
        return time.perf_counter() - start

    counters = engine.scheduler.counters
    before = counters.draft_tokens, counters.accepted
    seconds(True), seconds(False)  # the prompts are in the prefix cache: decoding is what is timed
    mine, theirs = [], []
    for turn in range(SIZES[kind][0]):
        for drafting in (True, False) if turn % 2 else (False, True):
            (mine if drafting else theirs).append(seconds(drafting))
    benchmark.pedantic(lambda: seconds(True), rounds=1)
    draft_tokens, accepted = counters.draft_tokens - before[0], counters.accepted - before[1]
    ratio = statistics.median(their / my for their, my in zip(theirs, mine))  # of neighbours in time
    benchmark.extra_info.update(
        ratio=round(ratio, 3), gate=str(gate), drafting_s=mine, plain_s=theirs, tokens=sum(map(len, works)) * SIZES[kind][1],
        draft_tokens=draft_tokens, accepted=accepted, torch=torch.__version__, threads=torch.get_num_threads(),
    )  # fmt: skip
    print(f"\ndraft tokens {draft_tokens}, accepted {accepted}")
    gate.check(ratio)
