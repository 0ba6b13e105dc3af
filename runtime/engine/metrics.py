"""What the engine counts, and its Prometheus text.

Knows numbers and metric names: histograms are kept here, totals are read off `Counts`. Knows no torch, no sockets and
no clock: the engine hands in durations. What stands under `vllm:` has the name, the buckets and the meaning that it has
there, so dashboards of the field fit; under `pagegraph:` the same stands again, with what only this engine counts. The
engine's thread writes, any thread may render: a scrape may see one step half counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.runtime.scheduler.chunk_limit import ChunkCounts
from pagegraph.runtime.scheduler.counters import Counters

FIELD, OWN = "vllm:", "pagegraph:"
PREFIXES = (FIELD, OWN)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COMPILE_STATES = ("off", "compiling", "compiled", "failed")
FINISH_REASONS = ("stop", "length", "abort", "error")
REFUSALS = ("queue", "key")  # for a full queue, or a limit of the request's key
# Of what vLLM tells apart, only the first is ever so here; its dashboards ask for it by these names.
WAITS = ("capacity", "deferred")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
         80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_ITL = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
        0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
_REQUEST_TIME = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
                 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_TPOT = _ITL[7:]  # as vLLM has them, whose ITL starts there too
_NUM_SAMPLES = (1, 2, 5, 10, 20)
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Histogram:
    """Counts by upper bound, and the sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        self._bounds = np.array(self.bounds)
        self.counts = np.zeros(len(self.bounds) + 1, np.int64)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: np.ndarray) -> None:
        """Count every value, float64 [n]."""
        self.counts += np.bincount(self._bounds.searchsorted(values), minlength=len(self.counts))
        self.total += float(values.sum())

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations at or below it), the last bound being "+Inf"."""
        running = 0
        pairs: list[tuple[str, float]] = []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts.tolist(), strict=True):
            running += count
            pairs.append((bound, running))
        return pairs


@dataclass(frozen=True, slots=True)
class Counts:
    """Where the engine stands at one moment, and what scheduler and device have counted since the start."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0 to 1
    scheduled: Counters = field(default_factory=Counters)
    launched: StepCounts = field(default_factory=StepCounts)
    chunks: ChunkCounts = field(default_factory=ChunkCounts)

    @property
    def graph_hit_ratio(self) -> float:
        return self.launched.graphed / self.launched.steps if self.launched.steps else 0.0


class EngineMetrics:
    """The engine's counters. Times are seconds; `model_name` and `rank`, as `engine`, become labels of every sample."""

    def __init__(self, model_name: str, max_model_len: int, prefixes: Sequence[str] = PREFIXES, rank: int = 0) -> None:
        self._labels = {"model_name": model_name, "engine": str(rank)}
        self._prefixes = tuple(prefixes)
        self.compile_state: Callable[[], str] = lambda: "off"  # one of COMPILE_STATES
        self.counts: Callable[[], Counts] = Counts  # called at each reading, in the reader's thread
        self._success: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self._refused: dict[str, int] = dict.fromkeys(REFUSALS, 0)
        lengths = _one_two_five(max_model_len)
        self._histograms = {
            "iteration_tokens_total": Histogram(_ITERATION_TOKENS),
            "time_to_first_token_seconds": Histogram(_TTFT),
            "inter_token_latency_seconds": Histogram(_ITL),
            "e2e_request_latency_seconds": Histogram(_REQUEST_TIME),
            "request_queue_time_seconds": Histogram(_REQUEST_TIME),
            "request_prefill_time_seconds": Histogram(_REQUEST_TIME),
            "request_decode_time_seconds": Histogram(_REQUEST_TIME),
            "request_inference_time_seconds": Histogram(_REQUEST_TIME),
            "request_time_per_output_token_seconds": Histogram(_TPOT),
            "request_prompt_tokens": Histogram(lengths),
            "request_generation_tokens": Histogram(lengths),
            "request_max_num_generation_tokens": Histogram(lengths),
            "request_params_n": Histogram(_NUM_SAMPLES),
            "request_params_max_tokens": Histogram(lengths),
        }
        self.cache_config: dict[str, str] = {}  # what is told of the KV cache, by name of its label

    def observe_step(self, tokens: int) -> None:
        """A step brought so many: see `_HELP`."""
        self._histograms["iteration_tokens_total"].observe(tokens)

    def observe_first_token(self, since_arrival: float) -> None:
        """A sequence's first token is out, `since_arrival` seconds after it arrived."""
        self._histograms["time_to_first_token_seconds"].observe(since_arrival)

    def observe_inter_tokens(self, gaps: np.ndarray) -> None:
        """Sequences got a token each, gaps[i] seconds after the one before; float64 [n]."""
        self._histograms["inter_token_latency_seconds"].observe_all(gaps)

    def observe_finished(self, reason: str) -> None:
        """A sequence ended for one of FINISH_REASONS; another reason raises KeyError."""
        self._success[reason] += 1

    def observe_refused(self, reason: str, sequences: int) -> None:
        """So many sequences of one request were not let in, for one of REFUSALS; another reason raises KeyError."""
        self._refused[reason] += sequences

    def observe_served(
        self,
        *,
        queue_time: float,
        prefill_time: float,
        decode_time: float,
        since_arrival: float,
        prompt_tokens: int,
        generation_tokens: int,
        max_tokens: int,
    ) -> None:
        """A sequence came to its end, which nobody had to abort: seconds and tokens of all of it."""
        self._histograms["e2e_request_latency_seconds"].observe(since_arrival)
        self._histograms["request_queue_time_seconds"].observe(queue_time)
        self._histograms["request_prefill_time_seconds"].observe(prefill_time)
        self._histograms["request_decode_time_seconds"].observe(decode_time)
        self._histograms["request_inference_time_seconds"].observe(prefill_time + decode_time)
        self._histograms["request_prompt_tokens"].observe(prompt_tokens)
        self._histograms["request_generation_tokens"].observe(generation_tokens)
        self._histograms["request_params_max_tokens"].observe(max_tokens)
        between = decode_time / (generation_tokens - 1) if generation_tokens > 1 else 0.0
        self._histograms["request_time_per_output_token_seconds"].observe(between)

    def observe_samples(self, count: int, most_tokens: int) -> None:
        """All `count` sequences of one prompt were served, the longest with so many tokens."""
        self._histograms["request_params_n"].observe(count)
        self._histograms["request_max_num_generation_tokens"].observe(most_tokens)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Metric families as prometheus-client's registries yield them."""
        counts = self.counts()
        for prefix in self._prefixes:
            yield from self._families(prefix, counts)
        states = GaugeMetricFamily(
            "pagegraph:compile_state",
            "1 for the state that the compilation of the model is in.",
            labels=[*self._labels, "state"],
        )
        now = self.compile_state()
        for state in COMPILE_STATES:
            states.add_metric([*self._labels.values(), state], float(state == now))
        yield states

    def _families(self, prefix: str, counts: Counts) -> Iterable[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for family, readers in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, read in readers.items():
                if prefix == FIELD and name in _OWN_NAMES:
                    continue
                one = family(prefix + name, _HELP[name], labels=names)
                one.add_metric(values, read(counts))
                yield one
        for name, label, states, now in (
            ("num_requests_waiting_by_reason", "reason", WAITS, counts.num_waiting),
            ("engine_sleep_state", "sleep_state", SLEEP_STATES, 1),
        ):
            one = GaugeMetricFamily(prefix + name, _HELP[name], labels=[*names, label])
            for state in states:
                one.add_metric([*values, state], float(now) if state == states[0] else 0.0)
            yield one
        name = "cache_config_info"
        config = GaugeMetricFamily(prefix + name, _HELP[name], labels=[*names, *self.cache_config])
        config.add_metric([*values, *self.cache_config.values()], 1.0)
        yield config
        scheduled = counts.scheduled
        name, cached = "prompt_tokens_by_source", scheduled.cached_tokens
        sources = CounterMetricFamily(prefix + name, _HELP[name], labels=[*names, "source"])
        sources.add_metric([*values, "local_compute"], scheduled.prompt_tokens - cached)
        sources.add_metric([*values, "local_cache_hit"], cached)
        yield sources
        name = "spec_decode_num_accepted_tokens_per_pos"
        places = CounterMetricFamily(prefix + name, _HELP[name], labels=[*names, "position"])
        for place, count in enumerate(scheduled.accepted_at):
            places.add_metric([*values, str(place)], count)
        yield places
        success = CounterMetricFamily(
            prefix + "request_success", _HELP["request_success"], labels=[*names, "finished_reason"]
        )
        for reason, count in self._success.items():
            success.add_metric([*values, reason], count)
        yield success
        if prefix == OWN:
            name = "requests_refused"
            refused = CounterMetricFamily(prefix + name, _HELP[name], labels=[*names, "reason"])
            for why, count in self._refused.items():
                refused.add_metric([*values, why], count)
            yield refused
            name = "graph_misses"
            misses = CounterMetricFamily(prefix + name, _HELP[name], labels=[*names, "reason"])
            for why, count in counts.launched.graph_misses.items():
                misses.add_metric([*values, why], count)
            yield misses
            name = "chunked_steps"
            limited = CounterMetricFamily(prefix + name, _HELP[name], labels=[*names, "limit"])
            for limit, count in counts.chunks.steps.items():
                limited.add_metric([*values, limit], count)
            yield limited
        for name, histogram in self._histograms.items():
            family = HistogramMetricFamily(prefix + name, _HELP[name], labels=names)
            family.add_metric(values, buckets=histogram.cumulative(), sum_value=histogram.total)
            yield family


def _one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`."""
    values = (digit * 10**power for power in range(len(str(limit)) + 1) for digit in (1, 2, 5))
    return [value for value in values if value <= limit]


_GAUGES: dict[str, Callable[[Counts], float]] = {
    "num_requests_running": lambda counts: counts.num_running,
    "num_requests_waiting": lambda counts: counts.num_waiting,
    "kv_cache_usage_perc": lambda counts: counts.kv_cache_usage,
    "graph_hit_ratio": lambda counts: counts.graph_hit_ratio,
    "step_target_seconds": lambda counts: counts.chunks.target_ms / 1e3,
    "spec_decode_mean_draft_tokens": lambda counts: counts.scheduled.mean_draft_tokens,
    "spec_decode_guesses_a_row": lambda counts: counts.scheduled.mean_draft_tokens,
}
_COUNTERS: dict[str, Callable[[Counts], int]] = {
    "prefix_cache_queries": lambda counts: counts.scheduled.prefix_queries,
    "prefix_cache_hits": lambda counts: counts.scheduled.prefix_hits,
    "num_preemptions": lambda counts: counts.scheduled.preemptions,
    "prompt_tokens": lambda counts: counts.scheduled.prompt_tokens,
    "prompt_tokens_cached": lambda counts: counts.scheduled.cached_tokens,
    "generation_tokens": lambda counts: counts.scheduled.generated_tokens,
    "engine_steps": lambda counts: counts.launched.steps,
    "engine_step_tokens": lambda counts: counts.launched.tokens,
    "engine_padding_tokens": lambda counts: counts.launched.padding,
    "spec_decode_num_drafts": lambda counts: counts.scheduled.drafts,
    "spec_decode_num_draft_tokens": lambda counts: counts.scheduled.draft_tokens,
    "spec_decode_num_accepted_tokens": lambda counts: counts.scheduled.accepted,
    "spec_decode_saved_steps": lambda counts: counts.scheduled.saved_steps,
}

# What only this engine counts.
_OWN_NAMES = frozenset({
    "engine_steps", "engine_step_tokens", "engine_padding_tokens", "graph_hit_ratio", "step_target_seconds",
    "spec_decode_saved_steps", "spec_decode_mean_draft_tokens", "spec_decode_guesses_a_row",
})  # fmt: skip

# A request is a sequence here: each of n choices, and each prompt of a list, is one.
_HELP = {
    "num_requests_running": "Requests that hold KV blocks and take part in steps, now.",
    "num_requests_waiting": "Requests that wait for a place in the batch, preempted ones too, now.",
    "num_requests_waiting_by_reason": "num_requests_waiting, all of which wait for capacity: KV blocks or a place in the batch.",
    "engine_sleep_state": "1 for the state that the engine is in: awake, always.",
    "kv_cache_usage_perc": "Share of KV blocks that running requests hold, 1 is all; what is only cached is free.",
    "prefix_cache_queries": "Tokens of prompts looked up in the prefix cache, each prompt once: not again after a preemption.",
    "prefix_cache_hits": "Of the tokens looked up, those found: computed before, for this request or another.",
    "num_preemptions": "Times that a running request gave up its blocks and went back to the queue.",
    "prompt_tokens": "Tokens of prompts, counted when the first token comes: found in the cache or computed, each prompt once.",
    "prompt_tokens_cached": "Of prompt_tokens, those found in the prefix cache.",
    "prompt_tokens_by_source": "prompt_tokens by where their keys and values came from.",
    "generation_tokens": "Tokens generated, all that steps brought requests.",
    "iteration_tokens_total": "Of each step: tokens it generated, and computed tokens of the prompts that were done in it.",
    "engine_steps": "Steps launched.",
    "engine_step_tokens": "Tokens of launched steps, padding left out.",
    "engine_padding_tokens": "Tokens that padding to a captured size added.",
    "graph_hit_ratio": "Share of launched steps that replayed a CUDA graph, 1 is all; 0 without a GPU.",
    "graph_misses": "Steps launched on a GPU that replayed no CUDA graph, by reason.",
    "step_target_seconds": "What the last step with decodes beside prompts was to last at most, more for a backlog; 0: no target.",
    "chunked_steps": "Steps with decodes while prompts waited, by what limited the prompt tokens: target (of inter_token_target_ms), backlog (of waiting prompts) or budget (max_num_batched_tokens).",
    "spec_decode_num_drafts": "Times a request had draft tokens in a step.",
    "spec_decode_num_draft_tokens": "Draft tokens that were verified.",
    "spec_decode_num_accepted_tokens": "Draft tokens that were accepted.",
    "spec_decode_num_accepted_tokens_per_pos": "Draft tokens that were accepted, by their place in the draft, the first at 0.",
    "spec_decode_saved_steps": "Tokens beyond the first that a step brought a sequence.",
    "spec_decode_mean_draft_tokens": "Draft tokens a sequence in the last step that could have had any.",
    "spec_decode_guesses_a_row": "The same as spec_decode_mean_draft_tokens, by its former name.",
    "time_to_first_token_seconds": "Of each request with a first token: from its arrival to that.",
    "inter_token_latency_seconds": "From one step that brought a request tokens to the next that does, however many they bring.",
    "request_success": "Requests that ended, by reason.",
    "requests_refused": "Requests that were not let in, by reason: queue (max_queue, max_queue_tokens: 503) or key (its limits: 429).",
    "e2e_request_latency_seconds": "Of requests that ended and were not aborted: from arrival to the last token.",
    "request_queue_time_seconds": "Of those: from arrival to the launch of the first step.",
    "request_prefill_time_seconds": "Of those: from the launch of the first step to the first token.",
    "request_decode_time_seconds": "Of those: from the first token to the last.",
    "request_inference_time_seconds": "Of those: from the launch of the first step to the last token.",
    "request_time_per_output_token_seconds": "Of those: from the first token to the last over the tokens behind the first; 0 of one token.",
    "request_prompt_tokens": "Of those: tokens of the prompt, cached ones too.",
    "request_generation_tokens": "Of those: tokens generated.",
    "request_params_max_tokens": "Of those: max_tokens, or what the context left.",
    "request_params_n": "Of prompts all of whose sequences were served: how many those were.",
    "request_max_num_generation_tokens": "Of those prompts: tokens of the longest sequence.",
    "cache_config_info": "1; labels say what the KV cache is like.",
}
