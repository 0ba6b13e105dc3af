"""What grammars take of a step of 64 sequences on this machine's CPU, against the same work without; one real model."""

from __future__ import annotations

import pytest

from pagegraph.compiler.build import build_compiled
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.structured_output import StructuredOutputs
from perf.gates import Gate
from perf.test_cpu_engine import config_of, ratio

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


def test_grammars_take_little_of_a_step(benchmark, gate: Gate) -> None:
    config = config_of(max_num_seqs=SEQS)
    llm = LLM(config, built=build_compiled(compiler_options(config), progress=False))
    prompts = [llm.tokenizer.encode(f"A list of {number} people as JSON:") for number in range(SEQS)]

    def run(structured: StructuredOutputs | None) -> None:
        params = [
            SamplingParams(
                max_tokens=TOKENS, temperature=1.0, seed=seed, ignore_eos=True, structured_outputs=structured
            )
            for seed in range(SEQS)
        ]
        assert all(len(one.token_ids) == TOKENS for one in llm.generate(prompts, params))

    held = StructuredOutputs(json=PEOPLE)
    run(held)
    ratio(benchmark, lambda: run(held), lambda: run(None), gate, pairs=5)
