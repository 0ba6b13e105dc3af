"""Quantised against bfloat16 on this machine's CPU, one real model; gates are ratios of the same run.

Each case alternates the two sides and compares medians, as `test_cpu_engine` does. Memory is
that of a process of its own: what it holds once the model is loaded (anonymous), and the peak of all that was resident.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from pagegraph.compiler.build import build_compiled
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from perf.gates import Gate
from perf.test_cpu_engine import MODEL, config_of, greedy, ratio
from tests.prompts import PROMPTS

METHODS = ("int8", "int4")
PAIRS = 24  # of one stream: neighbouring runs differ by a tenth
TURN = itertools.count()  # of prompts: none is another's prefix

pytestmark = pytest.mark.timeout(1800)  # three compilations


@pytest.fixture(scope="module")
def llms() -> dict[str | None, LLM]:
    configs = {method: config_of(quantization=method, kv_cache_memory="128MiB") for method in (None, *METHODS)}
    return {
        method: LLM(config, built=build_compiled(compiler_options(config), progress=False))
        for method, config in configs.items()
    }


@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_streams(benchmark, gate: Gate, llms: dict[str | None, LLM], method: str, streams: int) -> None:
    prompts = PROMPTS[1 : 1 + streams]
    ratio(
        benchmark,
        lambda: llms[method].generate(prompts, greedy(48)),
        lambda: llms[None].generate(prompts, greedy(48)),
        gate,
        pairs=PAIRS // streams,
    )
    benchmark.extra_info["tokens_per_s"] = round(streams * 48 / min(benchmark.extra_info["ours_s"]), 1)


@pytest.mark.parametrize("method", METHODS)
def test_prompt(benchmark, gate: Gate, llms: dict[str | None, LLM], method: str) -> None:
    """A prompt of 256 tokens, each time another: what many rows lose by products that are made for few."""

    def prompt() -> list[list[int]]:
        seed = next(TURN)
        return [[(7 * seed + 11 * index) % 40000 + 100 for index in range(256)]]

    ratio(
        benchmark,
        lambda: llms[method].generate(prompt(), greedy(1)),
        lambda: llms[None].generate(prompt(), greedy(1)),
        gate,
    )


WEIGHTS = """
import sys
from pagegraph.compiler.build import build_model
from pagegraph.runtime.config import load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
method = None if sys.argv[2] == "none" else sys.argv[2]
settings = dict(dtype="bfloat16", device="cpu", max_model_len=256, kv_cache_memory="16MiB", max_num_seqs=4, quantization=method)

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

model = build_model(compiler_options(load_config(sys.argv[1], settings).config), progress=False).step.paged_model.model
held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
print(sum(held.values()), status("RssAnon"), status("VmHWM"))
"""


@pytest.mark.parametrize("method", METHODS)
def test_memory(benchmark, gate: Gate, method: str) -> None:
    """Bytes of weights held, as a share of bfloat16's; the embedding, a fifth of this model, stays as it is."""

    def held(of: str) -> tuple[int, int, int]:
        out = subprocess.run(
            [sys.executable, "-c", WEIGHTS, MODEL, of], check=True, capture_output=True, text=True
        ).stdout
        return tuple(map(int, out.split()[-3:]))

    both = benchmark.pedantic(lambda: (held(method), held("none")), rounds=1)
    shown = {what: tuple(one[at] for one in both) for at, what in enumerate(("weights", "process", "peak"))}
    benchmark.extra_info.update(ratio=round(both[0][0] / both[1][0], 3), bytes=shown)
    print(
        f"\n{method}: "
        + ", ".join(f"{what} {ours >> 20} of {plain >> 20} MiB" for what, (ours, plain) in shown.items())
    )
    gate.check(both[0][0] / both[1][0])
