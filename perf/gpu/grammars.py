"""What grammars cost in the engine: turns of a decode whose sequences have one, over turns of one whose have none.

Weights are random, and so are the tokens, as far as the grammar leaves a choice. Masks of strings without a bound cost
the same for such text as for English; strings near their `maxLength` are dear for both. Wants a folder with the
tokenizer of a vocabulary of the model's size. Knows the engine by its public parts alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pagegraph.runtime.structured_output import StructuredOutputs
from perf.gpu.offline import Offline, built_of, config_of, random_prompts
from perf.gpu.report import Report

SEQS, TOKENS = 64, 384
PROMPTS = (1024, 64)
REPEATS = 2


def _objects(bound: int | None = None, kind: str = "kind") -> StructuredOutputs:
    """A list of objects without end; their strings have at most `bound` characters."""
    string = {"type": "string"} if bound is None else {"type": "string", "maxLength": bound}
    properties = {
        "name": string,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        kind: {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": string, "maxItems": 4},
    }
    item = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return StructuredOutputs(json=json.dumps({"type": "array", "minItems": 1000, "items": item}))


CASES: dict[str, Callable[[int], StructuredOutputs | None]] = {
    "none": lambda index: None,
    "one schema": lambda index: _objects(),
    "one schema, every other sequence": lambda index: None if index % 2 else _objects(),
    "a schema each": lambda index: _objects(kind=f"kind{index}"),
    "free text, then a word": lambda index: StructuredOutputs(grammar='start: /(?s:.*)/ "</end>"'),
    "one schema, strings of 12 characters": lambda index: _objects(bound=12),
}


class _Timed:
    """Microseconds of each call of a method that the engine calls."""

    def __init__(self, owner: Any, method: str) -> None:
        self.us: list[float] = []
        self._call = getattr(owner, method)
        setattr(owner, method, self)

    def __call__(self, *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = self._call(*arguments)
        self.us.append((time.perf_counter() - begun) * 1e6)
        return result


def grammars(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Milliseconds of full turns at two lengths of prompts; ratio of medians and means to turns without grammars."""
    _, built = built_of(shared)
    built = dataclasses.replace(built, eos_ids=built.eos_ids or frozenset({0}))
    seqs, tokens = (8, 24) if args.tiny else (SEQS, TOKENS)
    for length in PROMPTS[-1:] if args.tiny else PROMPTS:
        prompts = random_prompts(0, [length] * seqs, built.vocab_size)
        without: tuple[float, float] | None = None
        for case, structured in CASES.items():
            if report.out_of_time((case, length)):
                return
            config = config_of(args, args.models[0], tokenizer=str(args.weights), max_num_seqs=seqs)
            offline = Offline(config, built)
            assert offline.engine.grammars is not None
            advance, fill = (_Timed(offline.engine.grammars.masks, method) for method in ("advance", "fill"))
            given = [dict(structured_outputs=structured(index)) for index in range(seqs)]
            full = []
            for repeat in range(REPEATS + 1):
                run = offline.run(prompts, [tokens] * seqs, each=given, temperature=1.0)
                if repeat:  # the first finds what their grammars learn
                    full += [turn for turn in run.turns if turn.num_decodes == seqs]
            times, waits = [turn.seconds * 1e3 for turn in full], [turn.wait * 1e6 for turn in full]
            median, mean = statistics.median(times), statistics.mean(times)
            without = without or (median, mean)
            report.row(
                case=case, prompt=length, seqs=seqs, turn_ms=median, mean_ms=mean, p99_ms=float(np.quantile(times, 0.99)),
                advance_us=statistics.median(advance.us), fill_us=statistics.median(fill.us or [0.0]),
                wait_us=statistics.median(waits), ratio=median / without[0], mean_ratio=mean / without[1],
            )  # fmt: skip
