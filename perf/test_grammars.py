"""What grammars take of the steps of 64 sequences on this machine's CPU: masks, tokens taken, ids sampled anew.

The share of the time of a run that their calls take, because whole runs beside each other differ by more than that. Masks
are computed beside the forward, which leaves them a processor of two at best. One real model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from pagegraph.compiler.build import build_compiled
from pagegraph.compiler.step import executor
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.structured_output import StructuredOutputs
from perf.gates import Gate
from perf.test_cpu_engine import config_of

SEQS, TOKENS = 64, 48
PEOPLE = {
    "type": "array",
    "minItems": 100,  # none comes to its end
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"enum": ["Paris", "Rome", "Oslo"]},
        },
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    },
}

pytestmark = pytest.mark.timeout(1800)


def test_grammars_take_little_of_a_step(benchmark, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(max_num_seqs=SEQS)
    llm = LLM(config, built=build_compiled(compiler_options(config), progress=False))
    prompts = [llm.tokenizer.encode(f"A list of {number} people as JSON:") for number in range(SEQS)]
    held = StructuredOutputs(json=PEOPLE)
    params = [
        SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=seed, ignore_eos=True, structured_outputs=held)
        for seed in range(SEQS)
    ]
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun

        monkeypatch.setattr(owner, name, wrapped)

    assert llm.engine.grammars is not None
    timed(llm.engine.grammars.masks, "advance")
    timed(llm.engine.grammars.masks, "fill")
    timed(executor, "sample_allowed")

    def run() -> float:
        spent.clear()
        begun = time.perf_counter()
        assert all(len(one.token_ids) == TOKENS for one in llm.generate(prompts, params))
        return sum(spent.values()) / (time.perf_counter() - begun)

    run()  # what the grammar learns
    shares = sorted(run() for _ in range(5))
    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(shares=shares, seconds=dict(spent))
    gate.check(shares[len(shares) // 2])
