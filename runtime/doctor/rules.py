"""Common problems of a running server, each a rule: a name, a condition over its metrics, and what to change.

A rule reads `Metrics` and says its advice, or nothing. Totals count from the server's start, so advice is about all of its
life. Knows no sockets and no settings: values that a rule names are made of what the server counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from pagegraph.compiler.step.capture_sizes import MAX_CAPTURED_TOKENS
from pagegraph.runtime.engine.metrics import OWN
from pagegraph.runtime.server.restarts import REASONS

FEW = 20  # requests, or steps, below which nothing is said of shares


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that holds."""

    rule: str
    advice: str


class Metrics:
    """A server's metrics by name without prefix; raises ValueError for a text that holds none of this engine's."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(OWN):
                    known = self._samples.setdefault(sample.name.removeprefix(OWN), [])
                    known.append((sample.labels, sample.value))
        if not self._samples:
            raise ValueError(f"the text holds no metric that begins with {OWN}; is it the /metrics of this engine?")

    def __call__(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels; 0 where there are none."""
        return sum(
            value
            for given, value in self._samples.get(name, [])
            if all(given.get(label) == wanted for label, wanted in labels.items())
        )

    def mean_of(self, gauge: str) -> float:
        """Of the engines; 0 where there are none."""
        values = [value for _, value in self._samples.get(gauge, [])]
        return sum(values) / len(values) if values else 0.0

    def mean(self, histogram: str) -> float:
        """0 where nothing was observed."""
        count = self(f"{histogram}_count")
        return self(f"{histogram}_sum") / count if count else 0.0

    def quantile(self, histogram: str, share: float) -> float:
        """The bound below which so many observations lie; 0 where there are none."""
        counts: defaultdict[float, float] = defaultdict(float)  # of all engines
        for labels, value in self._samples.get(f"{histogram}_bucket", []):
            counts[float(labels["le"])] += value
        wanted = share * self(f"{histogram}_count")
        return next((bound for bound in sorted(counts) if wanted and counts[bound] >= wanted), 0.0)

    @property
    def served(self) -> float:
        return self("e2e_request_latency_seconds_count")


def _preempted(of: Metrics) -> str | None:
    preempted, running = of("num_preemptions_total"), of("num_requests_running")
    if preempted < max(0.01 * of.served, 1):
        return None
    fewer = f"max_num_seqs={max(int(0.8 * running), 1)}" if running >= 2 else "max_num_seqs to 0.8 of what it is"
    return (
        f"{preempted:.0f} preemptions beside {of.served:.0f} requests: the blocks are too few for what runs at a time."
        f" Set kv_cache_dtype=fp8 (twice the tokens), raise kv_cache_memory or gpu_memory_utilization, or set {fewer}"
    )


def _waiting_beside_free_blocks(of: Metrics) -> str | None:
    running, waiting, usage = of("num_requests_running"), of("num_requests_waiting"), of.mean_of("kv_cache_usage_perc")
    if not waiting or usage > 0.7 or running < 1:
        return None
    more = min(running + waiting, 0.9 * running / max(usage, 0.01))
    return (
        f"{waiting:.0f} requests wait while {running:.0f} run in {usage:.0%} of the blocks: set max_num_seqs to"
        f" {max(int(more), int(running) + 1)}; `runtime explain` says what such a step takes"
    )


def _waiting_for_blocks(of: Metrics) -> str | None:
    waiting, usage = of("num_requests_waiting"), of.mean_of("kv_cache_usage_perc")
    if not waiting or usage < 0.9:
        return None
    share = (of("num_requests_running") + waiting) / max(of("num_requests_running"), 1)
    return (
        f"{waiting:.0f} requests wait and {usage:.0%} of the blocks are in use: {share:.1f} times the blocks would hold"
        " all. Set kv_cache_dtype=fp8, raise kv_cache_memory or gpu_memory_utilization, lower max_model_len, or"
        " quantise the weights"
    )


def _queue_too_short(of: Metrics) -> str | None:
    refused, first = of("requests_refused_total", reason="queue"), of.quantile("time_to_first_token_seconds", 0.9)
    if refused < max(0.01 * (of.served + refused), 2) or first > 10:
        return None
    return (
        f"{refused:.0f} requests were refused for a full queue beside {of.served:.0f} served, nine in ten of which had their"
        f" first token within {first:g} s: set max_queue to"
        f" {2 * max(int(of('num_requests_waiting')), int(of('num_requests_running')), 8)} or twice what it is, and max_queue_tokens"
        " alike; another replica where clients cannot wait"
    )


def _no_prefix_cache(of: Metrics) -> str | None:
    prompt = of.mean("request_prompt_tokens")
    if of.served < FEW or of("prefix_cache_queries_total") or prompt < 100:
        return None
    return (
        f"no prompt was looked up in the prefix cache, of {of.served:.0f} with {prompt:.0f} tokens in the mean: set"
        " enable_prefix_caching=true if prompts begin alike (a system prompt, turns of a chat)"
    )


def _stalls(of: Metrics) -> str | None:
    name = "inter_token_latency_seconds"
    middle, slow = of.quantile(name, 0.5), of.quantile(name, 0.99)
    if of(f"{name}_count") < 1000 or slow < 10 * middle or of("step_target_seconds"):
        return None
    return (
        f"one gap between tokens in a hundred is {slow * 1e3:.0f} ms or more, the median {middle * 1e3:.0f} ms, and steps"
        f" have no target: set enable_chunked_prefill=true and inter_token_target_ms=auto, or {3e3 * middle:.0f}"
    )


def _padding(of: Metrics) -> str | None:
    padding, tokens, steps = (of(f"engine_{one}_total") for one in ("padding_tokens", "step_tokens", "steps"))
    share = padding / (padding + tokens) if padding else 0.0
    if steps < FEW or share < 0.3 or not of("graph_hit_ratio"):
        return None
    return (
        f"{share:.0%} of the tokens of steps are padding, {padding / steps:.0f} a step: graphs of sizes between are"
        f" captured when nothing runs. If it stays, set max_num_seqs to a multiple of 8 near"
        f" {max(round(tokens / steps / 8) * 8, 8)}, the tokens of a step"
    )


def _graph_misses(of: Metrics) -> str | None:
    steps, large = of("engine_steps_total"), of("graph_misses_total", reason="too_many_tokens")
    other = of("graph_misses_total", reason="not_captured")
    if steps < FEW or large + other < 0.02 * steps:
        return None
    if large >= other:
        return (
            f"{large / steps:.0%} of the steps are larger than every CUDA graph: set max_num_batched_tokens to"
            f" {MAX_CAPTURED_TOKENS} or less"
        )
    return (
        f"{other / steps:.0%} of the steps found no captured CUDA graph: restart the server when nothing waits for it"
    )


def _slow_first_token(of: Metrics) -> str | None:
    first = of.quantile("time_to_first_token_seconds", 0.5)
    if of.served < FEW or first < 2:
        return None
    queue, prefill = of.mean("request_queue_time_seconds"), of.mean("request_prefill_time_seconds")
    said = f"half of the first tokens take {first:g} s or more: {queue:.2g} s in the queue, {prefill:.2g} s computing"
    if queue > prefill:
        return f"{said}. See what is said of waiting; else lower max_queue to {max(int(of('num_requests_running')), 1)}"
    return (
        f"{said} prompts of {of.mean('request_prompt_tokens'):.0f} tokens in the mean. Set inter_token_target_ms=none"
        " (longer gaps for others), or twice the max_num_batched_tokens"
    )


def _poor_drafts(of: Metrics) -> str | None:
    drafted, accepted = (of(f"spec_decode_num_{one}_tokens_total") for one in ("draft", "accepted"))
    if drafted < 1000 or accepted > 0.15 * drafted:
        return None
    return (
        f"{accepted / drafted:.0%} of {drafted:.0f} draft tokens were accepted: set num_speculative_tokens=auto, which"
        " drafts as many as pay, or speculative_method=none"
    )


def _not_compiled(of: Metrics) -> str | None:
    if not of("compile_state", state="failed"):
        return None
    return "the compilation failed and steps run uncompiled: the log says why; compile=required ends such a server"


def _failed_requests(of: Metrics) -> str | None:
    failed = of("request_success_total", finished_reason="error")
    return f"{failed:.0f} requests ended with an error: the log has the exception of each" if failed else None


def _restarted(of: Metrics) -> str | None:
    if not of("engine_restarts_total"):
        return None
    died, hung = (of("engine_restarts_total", reason=reason) for reason in REASONS)
    return (
        f"the engine was started anew, {died:.0f} times because it died and {hung:.0f} because it hung: the log has what it"
        " said last; where the system's log says that memory ran out, lower kv_cache_memory or max_num_batched_tokens"
    )


RULES: dict[str, Callable[[Metrics], str | None]] = {
    "preemptions": _preempted,
    "queue beside free blocks": _waiting_beside_free_blocks,
    "queue for blocks": _waiting_for_blocks,
    "queue too short": _queue_too_short,
    "no prefix cache": _no_prefix_cache,
    "prompts stall streams": _stalls,
    "padding": _padding,
    "graph misses": _graph_misses,
    "late first tokens": _slow_first_token,
    "drafts that miss": _poor_drafts,
    "not compiled": _not_compiled,
    "failed requests": _failed_requests,
    "restarts": _restarted,
}


def diagnose(text: str) -> list[Finding]:
    """What holds of a server with these metrics, in the order of the rules."""
    metrics = Metrics(text)
    return [Finding(name, advice) for name, rule in RULES.items() if (advice := rule(metrics))]
