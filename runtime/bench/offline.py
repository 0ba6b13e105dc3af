"""Work run through the offline engine: how fast a pile of requests is done, and how long one batch takes.

The only file here that needs an engine, which it is given as an `LLM`. Lengths are exact: an end-of-sequence token ends
nothing, unless the work has answers of its own. Knows no flags and no printing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagegraph.runtime.bench.client import Tick
from pagegraph.runtime.bench.measures import Figures
from pagegraph.runtime.bench.work import Request, rounds
from pagegraph.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagegraph.runtime.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True)
class Done:
    """Seconds of all requests, and the tokens that went in and came out."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # of the prompts', found in the prefix cache


def run(
    llm: LLM,
    requests: Sequence[Request],
    *,
    ignore_eos: bool,
    temperature: float = 0.0,
    tick: Tick = lambda: None,
) -> Done:
    """All requests at once, turn by turn where they follow each other. Raises ValueError before any, if one is too long."""
    ids = [llm.tokenizer.encode(one.prompt) if isinstance(one.prompt, str) else one.prompt for one in requests]
    histories: dict[int, list[int]] = {}
    prompts = outputs = cached = 0
    begin = time.perf_counter()
    for numbers in rounds(requests):
        asked = [_history(histories, requests[number]) + ids[number] for number in numbers]
        params = [
            SamplingParams(max_tokens=requests[number].output_len, temperature=temperature, ignore_eos=ignore_eos)
            for number in numbers
        ]
        for number, completion in zip(numbers, llm.generate(asked, params, tick=tick), strict=True):
            histories[number] = completion.prompt_token_ids + completion.token_ids
            prompts += len(completion.prompt_token_ids)
            outputs += len(completion.token_ids)
            cached += completion.cached_tokens
    return Done(time.perf_counter() - begin, prompts, outputs, cached)


def throughput_figures(done: Done, num_requests: int) -> Figures:
    """Under the names of `vllm bench throughput`, and what came out apart from what went in."""
    tokens = done.prompt_tokens + done.output_tokens
    return dict(
        elapsed_time=done.seconds,
        num_requests=num_requests,
        total_num_tokens=tokens,
        requests_per_second=num_requests / done.seconds,
        tokens_per_second=tokens / done.seconds,
        total_output_tokens=done.output_tokens,
        output_tokens_per_second=done.output_tokens / done.seconds,
        cached_prompt_tokens=done.cached_tokens,
    )


def latencies(batch: Callable[[], object], warmups: int, iterations: int, tick: Tick = lambda: None) -> list[float]:
    """Seconds of each of `iterations` calls, after `warmups` that do not count."""
    found = []
    for index in range(warmups + iterations):
        begin = time.perf_counter()
        batch()
        if index >= warmups:
            found.append(time.perf_counter() - begin)
        tick()
    return found


def seconds_summary(seconds: Sequence[float]) -> tuple[float, float, dict[str, float]]:
    """Mean, deviation, and the percentiles of PERCENTILES."""
    at = np.percentile(seconds, PERCENTILES).tolist()
    return float(np.mean(seconds)), float(np.std(seconds)), dict(zip(map(str, PERCENTILES), at, strict=True))


def latency_figures(seconds: Sequence[float]) -> Figures:
    """Under the names of `vllm bench latency`."""
    mean, deviation, percentiles = seconds_summary(seconds)
    return dict(avg_latency=mean, std_latency=deviation, latencies=list(seconds), percentiles=percentiles)


def _history(histories: dict[int, list[int]], request: Request) -> list[int]:
    return [] if request.follows is None else histories[request.follows]
