"""The engine against llama.cpp on this machine's CPU, the same GGUF file and tokens; gates are ratios of the same run.

Skipped where llama-cpp-python is not installed. This engine runs the file's weights as int4, llama.cpp as they are stored.
Its threads wait for each other without sleeping, so that other work on the machine costs it more: only a quiet one tells.
"""

from __future__ import annotations

import numpy as np
import pytest

from pagegraph.compiler.build import build_compiled
from pagegraph.compiler.host import step_thread
from pagegraph.runtime.bench.work import draw_ids
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from perf.gates import Gate
from perf.llama_cpp import LlamaCpp
from perf.test_cpu_engine import MODEL, config_of, greedy, ratio

STREAMS, PROMPT, OUTPUT = 32, 32, 48

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def llm() -> LLM:
    config = config_of(quantization="int4", enable_prefix_caching=False)
    return LLM(config, built=build_compiled(compiler_options(config), progress=False))


@pytest.fixture(scope="module")
def peer() -> LlamaCpp:
    pytest.importorskip("llama_cpp", reason="llama.cpp is compared where it is installed: pip install llama-cpp-python")
    return LlamaCpp(MODEL, STREAMS, 512)


@pytest.mark.parametrize("streams", [1, 8, 32])
def test_streams_of_llama_cpp(benchmark, gate: Gate, peer: LlamaCpp, llm: LLM, streams: int) -> None:
    prompts = draw_ids(np.random.default_rng(streams), [PROMPT] * streams, 40_000)

    def theirs() -> None:
        step_thread.rest()  # or its threads would not let the peer's stay awake
        peer.generate(prompts, [OUTPUT] * streams)

    ratio(benchmark, lambda: llm.generate(prompts, greedy(OUTPUT)), theirs, gate, pairs=9)
    benchmark.extra_info["llama_cpp"] = peer.system_info()
