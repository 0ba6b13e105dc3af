"""What `inter_token_target_ms` costs and brings: jobs that come at once, and Poisson arrivals, with and without it.

`auto` is a server's default, `none` what `LLM` has. Weights are random. Knows the engine by its public parts alone.
"""

from __future__ import annotations

import argparse

import numpy as np

from perf.gpu.offline import Offline, Run, built_of, config_of, random_prompts
from perf.gpu.report import Report

# case: [(requests, prompt tokens, output tokens)], handed over at once in this order
CASES = {
    "512 x (128, 256)": [(512, 128, 256)],
    "32 x (512, 256)": [(32, 512, 256)],
    "64 x (4096, 64)": [(64, 4096, 64)],
    "8 x (30000, 64)": [(8, 30000, 64)],
    "8 streams, a prompt of 100,000, 8 of 200": [(8, 128, 1000), (1, 100_000, 16), (8, 200, 16)],
}
TINY_CASES = {"8 streams, a prompt of 3000, 4 of 100": [(8, 32, 60), (1, 3000, 4), (4, 100, 4)]}
ARRIVALS = dict(rate=30, seconds=20, long=6000)  # Poisson, of chat lengths, one in twenty of `long` tokens
TINY_ARRIVALS = dict(rate=15, seconds=2, long=1000)


def chunk_limit(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Seconds of a job, gaps between tokens and TTFT of its last and of its longest prompt in ms, for each target."""
    _, built = built_of(shared)
    for case, kinds in (TINY_CASES if args.tiny else CASES).items():
        sizes = [prompt for count, prompt, _ in kinds for _ in range(count)]
        lengths = [output for count, _, output in kinds for _ in range(count)]
        if report.out_of_time(case):
            return
        if max(sizes) + max(lengths) > built.max_model_len:
            report.fact(skipped=f"{case}: longer than max_model_len")
            continue
        seconds = {}
        for target in args.targets:
            offline = Offline(config_of(args, args.models[0], inter_token_target_ms=target), built)
            # The limit follows measured steps: decodes alone and chunks of prompts come first.
            offline.run(random_prompts(1, [600] * 8, built.vocab_size), [24] * 8)
            run = offline.run(random_prompts(2, sizes, built.vocab_size), lengths)
            seconds[target] = run.seconds
            gaps = _gaps_ms(run)
            report.row(
                case=case, target=target, wall_s=run.seconds, to_first=run.seconds / seconds[args.targets[0]], steps=len(run.steps),
                gap_p50=np.percentile(gaps, 50), gap_p99=np.percentile(gaps, 99), gap_max=gaps.max(),
                ttft_last=1e3 * run.first_token_s[-1], ttft_longest=1e3 * run.first_token_s[int(np.argmax(sizes))],
            )  # fmt: skip


def arrivals(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """TTFT and gaps between tokens in ms, for each target, as requests come."""
    _, built = built_of(shared)
    given = TINY_ARRIVALS if args.tiny else ARRIVALS
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1 / given["rate"], given["rate"] * given["seconds"])).tolist()
    count = len(times)
    long = np.arange(count) % 20 == 10
    sizes = np.where(long, given["long"], rng.lognormal(5.2, 0.8, count).clip(4, 1024).astype(int))
    lengths = np.where(long, 64, rng.lognormal(5.0, 0.75, count).clip(4, 512).astype(int))
    prompts = random_prompts(3, sizes.tolist(), built.vocab_size)
    for target in args.targets:
        offline = Offline(config_of(args, args.models[0], inter_token_target_ms=target), built)
        offline.run(random_prompts(1, [600] * 8, built.vocab_size), [24] * 8)
        run = offline.run(prompts, lengths.tolist(), arrivals=times)
        gaps, ttft = _gaps_ms(run), 1e3 * np.array(run.first_token_s)
        report.row(
            case=f"{given['rate']} a second", target=target, wall_s=run.seconds,
            ttft_p50=np.percentile(ttft[~long], 50), ttft_p90=np.percentile(ttft[~long], 90),
            ttft_long_p50=np.percentile(ttft[long], 50), gap_p50=np.percentile(gaps, 50),
            gap_p99=np.percentile(gaps, 99), gap_p999=np.percentile(gaps, 99.9),
        )  # fmt: skip


def _gaps_ms(run: Run) -> np.ndarray:
    """Milliseconds of each turn that had decodes, once for each of them."""
    times = [1e3 * turn.seconds for turn in run.steps]
    decodes = [int((np.diff(turn.query_start) == 1).sum()) for turn in run.steps]
    return np.repeat(times, decodes)
