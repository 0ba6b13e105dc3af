"""What grammars cost in the engine: turns of a decode whose sequences have one, over turns of one whose have none.

Weights are random, and so are the tokens, as far as the grammar leaves a choice: rarer text than a model writes, whose
masks are dearer. Wants a folder with the tokenizer of a vocabulary of the model's size. Knows the engine by its public
parts alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics

from pagegraph.runtime.structured_output import StructuredOutputs
from perf.gpu.offline import Offline, built_of, config_of, random_prompts
from perf.gpu.report import Report

SEQS, PROMPT, TOKENS = 64, 64, 384
REPEATS = 3
_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "kind": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
CASES: dict[str, StructuredOutputs | None] = {
    "none": None,
    "json schema": StructuredOutputs(json=json.dumps({"type": "array", "minItems": 1000, "items": _ITEM})),
    "free text, then a word": StructuredOutputs(grammar='start: /(?s:.*)/ "</end>"'),
}


def grammars(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Median and mean milliseconds of full turns, with temperature and greedy; ratio to those without grammars."""
    _, built = built_of(shared)
    built = dataclasses.replace(built, eos_ids=built.eos_ids or frozenset({0}))
    seqs, tokens = (8, 24) if args.tiny else (SEQS, TOKENS)
    prompts = random_prompts(0, [PROMPT] * seqs, built.vocab_size)
    for temperature in (1.0, 0.0):
        without = 0.0
        for case, structured in CASES.items():
            if report.out_of_time((case, temperature)):
                return
            config = config_of(args, args.models[0], tokenizer=str(args.weights), max_num_seqs=seqs)
            offline = Offline(config, built)
            times: list[float] = []
            for repeat in range(REPEATS + 1):
                run = offline.run(prompts, [tokens] * seqs, temperature=temperature, structured_outputs=structured)
                full = [turn.seconds for turn in run.turns if turn.num_decodes == seqs]
                times += full if repeat else []
            median, mean = statistics.median(times) * 1e3, statistics.mean(times) * 1e3
            without = without or median
            report.row(
                case=case, temperature=temperature, seqs=seqs, turn_ms=median, mean_ms=mean, ratio=median / without
            )
