"""`deterministic`: whether tokens and log-probabilities are equal bit by bit in other company, and what that costs.

Requests run one after the other, all at once, in small steps, and with the prefix cache and draft tokens. The price is the
time of jobs and of their decode steps against an engine without it, in turns. Weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import numpy as np

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf.gpu.offline import Offline, Run, config_of, random_prompts
from perf.gpu.report import Report

REQUESTS, OUTPUT = 40, 26  # 1040 tokens of each way
WAYS: dict[str, dict[str, object]] = {
    "all at once": {},
    "in small steps": dict(max_num_batched_tokens=64, max_num_seqs=16),
    "cached": dict(enable_prefix_caching=True),
    "drafted": dict(speculative_method="ngram", num_speculative_tokens=3),
    "few blocks": dict(num_blocks=600),
}
# (requests, prompt tokens, output tokens)
JOBS = ((1, 256, 128), (32, 512, 128), (256, 128, 128), (16, 4000, 1))
TINY_JOBS = ((1, 32, 8), (8, 32, 8))
ROUNDS = 3


def deterministic(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Rows of comparisons, then of prices as ratios of seconds, with / without."""
    for model in args.models:
        limits = dict(num_blocks=4200, kv_cache_memory=None, max_model_len=4096)
        # Draft tokens need room in the built step; the n-gram proposer is of one engine's steps alone.
        config = config_of(args, model, deterministic=True, **limits, **WAYS["drafted"])
        built = build_compiled(compiler_options(config), progress=False)
        _compare(report, config, built, 4 if args.tiny else REQUESTS)
        plain = config_of(args, model, **limits)
        fixed = dataclasses.replace(plain, deterministic=True)
        sides = [(one, build_compiled(compiler_options(one), progress=False)) for one in (plain, fixed)]
        for job in TINY_JOBS if args.tiny else JOBS:
            if report.out_of_time(job):
                return
            _price(report, model, sides, *job)


def _compare(report: Report, config: Config, built: BuiltModel, count: int) -> None:
    rng = np.random.default_rng(0)
    prompts = random_prompts(3, rng.integers(1, 700, count).tolist(), built.vocab_size)
    prompts = [prompts[0][:64] + prompt if at % 2 else prompt for at, prompt in enumerate(prompts)]
    each = [dict(temperature=at % 3 / 2, seed=at, logprobs=3) for at in range(count)]

    def run(some: list[int], **way: object) -> Run:
        free = dict(speculative_method=None, num_speculative_tokens=None)
        there = dataclasses.replace(built, num_blocks=int(way.get("num_blocks", built.num_blocks)))
        offline = Offline(dataclasses.replace(config, **free | way), there)
        for _ in range(1 + ("enable_prefix_caching" in way)):  # the second time prompts are cached
            found = offline.run([prompts[at] for at in some], [OUTPUT] * len(some), [each[at] for at in some])
        return found

    alone = [run([at]).logprobs[0] for at in range(count)]
    for name, way in WAYS.items():
        found = run(list(range(count)), **way).logprobs
        pairs = [pair for one, other in zip(alone, found) for pair in zip(one, other, strict=True)]
        different = sum(one != other for one, other in pairs)
        report.row(way=name, compared=len(pairs), different=different)
        if different:
            report.failure(f"{name}: {different} of {len(pairs)} tokens with their log-probabilities differ")


def _price(
    report: Report, model: str, sides: list[tuple[Config, BuiltModel]], count: int, prompt: int, output: int
) -> None:
    jobs, steps = [], []
    for turn in range(ROUNDS + 1):
        prompts = random_prompts(turn, [prompt] * count, sides[0][1].vocab_size)
        runs = [Offline(*side).run(prompts, [output] * count) for side in sides]
        if turn:  # the first warms up
            jobs.append([run.seconds for run in runs])
            decodes = [[one.seconds for one in run.steps if one.num_decodes == count] for run in runs]
            steps.append([statistics.median(one) if one else float("nan") for one in decodes])
    seconds, step = np.median(jobs, axis=0), np.median(steps, axis=0)
    report.row(
        model=model, requests=count, prompt=prompt, output=output, without_s=seconds[0], with_s=seconds[1],
        ratio=np.median([b / a for a, b in jobs]), step_without_ms=1e3 * step[0], step_with_ms=1e3 * step[1],
        step_ratio=np.median([b / a for a, b in steps]),
    )  # fmt: skip
