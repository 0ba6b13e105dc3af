"""What a pass over the graph brings, against the same model without it: one that no longer finds its places brings nothing."""

from __future__ import annotations

import pytest

from pagegraph.compiler import build
from pagegraph.compiler.passes.graph.cpu_gemv import one_row_linears
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from perf.gates import Gate
from perf.test_cpu_engine import config_of, greedy, ratio
from tests.prompts import PROMPTS

pytestmark = pytest.mark.timeout(1800)  # two compilations


@pytest.fixture(scope="module")
def llms() -> dict[bool, LLM]:
    """With the pass, and without."""
    passes, config = build.graph_passes, config_of(kv_cache_memory="64MiB")
    found = {True: LLM(config, built=build.build_compiled(compiler_options(config), progress=False))}
    with pytest.MonkeyPatch.context() as patch:
        others = lambda *given: [one for one in passes(*given) if one is not one_row_linears]  # noqa: E731
        patch.setattr(build, "graph_passes", others)
        found[False] = LLM(config, built=build.build_compiled(compiler_options(config), progress=False))
    return found


def test_products_of_one_row(benchmark, gate: Gate, llms: dict[bool, LLM]) -> None:
    """The gate fails for an engine that is without the pass, which stands in for one whose pass finds nothing."""
    ids = llms[True].tokenizer.encode(PROMPTS[1])

    def run(applied: bool) -> None:
        llms[applied].generate([ids], greedy(48))

    ratio(benchmark, lambda: run(True), lambda: run(False), gate, pairs=9)
    with pytest.raises(AssertionError, match="test_products_of_one_row"):
        ratio(None, lambda: run(False), lambda: run(False), gate, pairs=9)
