"""From outcomes to figures, under the names of the JSON that `vllm bench serve` writes.

TTFT, TPOT, ITL and E2EL as mean, median, deviation and percentiles in milliseconds, rates over the whole duration, and
how many requests met their service level objectives. A figure of no values is None. Knows no server and no printing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pagegraph.runtime.bench.outcome import Outcome

METRICS = ("ttft", "tpot", "itl", "e2el")  # objectives are about the same
SLOW_GAP = 99  # of 100 gaps of a request, so many are within an objective of itl
Figures = dict[str, Any]


def figures(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    percentiles: Sequence[float] = (90, 99),
    metrics: Sequence[str] = METRICS,
    slos: Mapping[str, float] | None = None,
) -> Figures:
    """All figures of a run of `duration` seconds; `slos` are milliseconds by metric."""
    good = [outcome for outcome in outcomes if outcome.success]
    prompts, outputs = sum(one.prompt_len for one in good), sum(one.output_tokens for one in good)
    found: Figures = dict(
        duration=duration,
        completed=len(good),
        failed=len(outcomes) - len(good),
        total_input_tokens=prompts,
        total_output_tokens=outputs,
        request_throughput=len(good) / duration,
        request_goodput=sum(meets(one, slos) for one in good) / duration if slos else None,
        output_throughput=outputs / duration,
        total_token_throughput=(prompts + outputs) / duration,
        max_output_tokens_per_s=busiest_second(good),
        max_concurrent_requests=most_at_once(good),
    )
    values = {
        "ttft": [one.ttft for one in good],
        "tpot": [one.tpot for one in good if one.tpot is not None],
        "itl": [gap for one in good for gap in one.itl],
        "e2el": [one.latency for one in good],
    }
    for metric in metrics:
        found |= summary(metric, values[metric], percentiles)
    return found


def summary(metric: str, seconds: Sequence[float], percentiles: Sequence[float]) -> Figures:
    """`mean_ttft_ms` and so on."""
    named = {f"p{at:g}_{metric}_ms": at for at in percentiles}
    if not len(seconds):
        return {f"{what}_{metric}_ms": None for what in ("mean", "median", "std")} | dict.fromkeys(named)
    times = 1e3 * np.asarray(seconds, float)
    found: Figures = {
        f"mean_{metric}_ms": float(times.mean()),
        f"median_{metric}_ms": float(np.median(times)),
        f"std_{metric}_ms": float(times.std()),
    }
    return found | {name: float(np.percentile(times, at)) for name, at in named.items()}


def meets(outcome: Outcome, slos: Mapping[str, float]) -> bool:
    """Whether a request kept every objective. One of a single output token has no TPOT and no ITL to miss."""
    return all(judged_ms(outcome, metric) <= limit for metric, limit in slos.items())


def judged_ms(outcome: Outcome, metric: str) -> float:
    """What an objective about `metric` is held against: of itl the 99th percentile of the request's own gaps."""
    match metric:
        case "ttft":
            return 1e3 * outcome.ttft
        case "tpot":
            return 1e3 * (outcome.tpot or 0.0)
        case "itl":
            return 1e3 * float(np.percentile(outcome.itl, SLOW_GAP)) if outcome.itl else 0.0
        case "e2el":
            return 1e3 * outcome.latency
    raise ValueError(f"{metric} is none of {', '.join(METRICS)}")


def detail(outcomes: Sequence[Outcome]) -> Figures:
    """One value a request, in the order of the requests."""
    return dict(
        input_lens=[one.prompt_len for one in outcomes],
        output_lens=[one.output_tokens for one in outcomes],
        ttfts=[one.ttft for one in outcomes],
        itls=[one.itl for one in outcomes],
        latencies=[one.latency for one in outcomes],
        start_times=[one.start_time for one in outcomes],
        queue_times=[one.queue_time for one in outcomes],
        generated_texts=[one.text for one in outcomes],
        errors=[one.error for one in outcomes],
    )


def busiest_second(outcomes: Sequence[Outcome]) -> float:
    """Output tokens of the second that had most; an answer's tokens are spread evenly over its events."""
    if not outcomes:
        return 0.0
    begin, times, weights = min(one.start_time for one in outcomes), [], []
    for one in outcomes:
        events = one.start_time + one.ttft + np.concatenate([[0.0], np.cumsum(one.itl)])
        times.append(events)
        weights.append(np.full(len(events), one.output_tokens / len(events)))
    seconds = (np.concatenate(times) - begin).astype(int)
    return float(np.bincount(seconds, np.concatenate(weights)).max())


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """Requests in flight at the busiest moment; one that ends as another begins is not in flight with it."""
    changes = sorted(
        [(one.start_time, 1) for one in outcomes] + [(one.start_time + one.latency, -1) for one in outcomes]
    )
    return int(np.cumsum([change for _, change in changes]).max(initial=0)) if changes else 0
