"""Engine metrics: names, counts and buckets as a Prometheus parser reads them."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pagegraph.compiler.step.counts import StepCounts
from pagegraph.runtime.engine.metrics import Counts, EngineMetrics
from pagegraph.runtime.scheduler.chunk_limit import ChunkCounts
from pagegraph.runtime.scheduler.counters import Counters
from pagegraph.runtime.scheduler.sequence import Samples


def samples(metrics: EngineMetrics) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le") or ""): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("prefix", ["vllm:", "pagegraph:"])
def test_a_served_request(prefix: str) -> None:
    metrics = EngineMetrics("tiny", 4096)
    metrics.observe_step(30)
    metrics.observe_step(2)
    counters = Counters(
        prompt_tokens=30, cached_tokens=10, generated_tokens=2, prefix_queries=40, prefix_hits=10, preemptions=1
    )
    metrics.counts = lambda: Counts(num_running=1, kv_cache_usage=0.5, scheduled=counters)
    metrics.observe_first_token(0.03)
    metrics.observe_inter_tokens(np.array([0.002, 0.002, 1000.0, 0.002]))
    metrics.observe_finished("length")
    metrics.observe_served(
        queue_time=0.4,
        prefill_time=0.2,
        decode_time=0.9,
        since_arrival=1.5,
        prompt_tokens=40,
        generation_tokens=4,
        max_tokens=5,
    )
    got = samples(metrics)
    assert got[prefix + "num_requests_running", ""] == 1
    assert got[prefix + "kv_cache_usage_perc", ""] == 0.5
    assert got[prefix + "prefix_cache_queries_total", ""] == 40
    assert got[prefix + "prefix_cache_hits_total", ""] == 10
    assert got[prefix + "num_preemptions_total", ""] == 1
    assert got[prefix + "prompt_tokens_total", ""] == 30
    assert got[prefix + "generation_tokens_total", ""] == 2
    assert got[prefix + "request_success_total", "length"] == 1
    assert got[prefix + "request_success_total", "stop"] == 0
    assert got[prefix + "time_to_first_token_seconds_bucket", "0.02"] == 0
    assert got[prefix + "time_to_first_token_seconds_bucket", "0.04"] == 1
    assert got[prefix + "inter_token_latency_seconds_bucket", "0.001"] == 0
    assert got[prefix + "inter_token_latency_seconds_bucket", "0.002"] == 3
    assert got[prefix + "inter_token_latency_seconds_bucket", "+Inf"] == 4
    assert got[prefix + "inter_token_latency_seconds_sum", ""] == pytest.approx(1000.006)
    assert got[prefix + "iteration_tokens_total_count", ""] == 2
    assert got[prefix + "request_prompt_tokens_bucket", "50.0"] == 1
    assert got[prefix + "e2e_request_latency_seconds_count", ""] == 1
    assert got[prefix + "request_queue_time_seconds_sum", ""] == 0.4
    assert got[prefix + "request_inference_time_seconds_sum", ""] == pytest.approx(1.1)
    assert got[prefix + "prompt_tokens_cached_total", ""] == 10
    assert got[prefix + "request_time_per_output_token_seconds_sum", ""] == pytest.approx(0.3)
    assert got[prefix + "request_params_max_tokens_sum", ""] == 5
    assert (
        b'prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"} 20.0' in metrics.render()
    )


def test_draft_tokens_are_counted_by_place() -> None:
    metrics = EngineMetrics("m", 100)
    counters = Counters(
        drafts=4, draft_tokens=12, accepted=7, accepted_at=[4, 2, 1], saved_steps=6, mean_draft_tokens=3.5
    )
    metrics.counts = lambda: Counts(scheduled=counters)
    text = metrics.render().decode()
    for name, value in (("num_drafts_total", 4), ("num_draft_tokens_total", 12), ("num_accepted_tokens_total", 7),
                        ("saved_steps_total", 6), ("mean_draft_tokens", 3.5), ("guesses_a_row", 3.5)):  # fmt: skip
        assert f'pagegraph:spec_decode_{name}{{engine="0",model_name="m"}} {float(value)}' in text
    assert 'spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 2.0' in text


def test_unknown_reason_is_an_error() -> None:
    with pytest.raises(KeyError):
        EngineMetrics("m", 16).observe_finished("odd")


def test_every_name_says_what_it_means_and_own_ones_do_not_pose_as_the_fields() -> None:
    families = {family.name: family for family in EngineMetrics("m", 16).collect()}
    assert all(len(family.documentation) > 10 for family in families.values())
    field = {name.removeprefix("vllm:") for name in families if name.startswith("vllm:")}
    own = {name.removeprefix("pagegraph:") for name in families if name.startswith("pagegraph:")}
    assert field < own and field == {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits",
        "num_preemptions", "prompt_tokens", "prompt_tokens_cached", "prompt_tokens_by_source", "generation_tokens",
        "request_success", "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "spec_decode_num_drafts", "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos",
        "request_time_per_output_token_seconds", "request_max_num_generation_tokens", "request_params_n",
        "request_params_max_tokens", "cache_config_info", "num_requests_waiting_by_reason", "engine_sleep_state",
    }  # fmt: skip


def test_what_waits_waits_for_capacity_and_the_engine_is_awake() -> None:
    metrics = EngineMetrics("m", 16)
    metrics.counts = lambda: Counts(num_waiting=3)
    text = metrics.render().decode()
    for name, of in {
        "num_requests_waiting_by_reason": {'reason="capacity"': 3.0, 'reason="deferred"': 0.0},
        "engine_sleep_state": {'sleep_state="awake"': 1.0, 'sleep_state="weights_offloaded"': 0.0},
    }.items():
        for label, value in of.items():
            assert f'vllm:{name}{{engine="0",model_name="m",{label}}} {value}\n' in text


HISTOGRAM = ("bucket", "sum", "count")
# What the Grafana dashboards that vLLM publishes (its examples/observability) ask of an engine that has no images, no adapters
# and no external cache: by the names of the text format, with the labels that they choose or sum by.
ASKED_BY_FIELD = {
    **{
        f"{name}_{end}": {"le"} if end == "bucket" else set()
        for end in HISTOGRAM
        for name in (
            "e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds",
            "request_time_per_output_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
            "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
            "request_max_num_generation_tokens",
        )
    },
    **dict.fromkeys(
        (
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
            "prompt_tokens_cached_total", "generation_tokens_total", "num_preemptions_total", "prefix_cache_queries_total",
            "prefix_cache_hits_total", "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
        ),
        set(),
    ),
    "request_success_total": {"finished_reason"},
    "prompt_tokens_by_source_total": {"source"},
    "spec_decode_num_accepted_tokens_per_pos_total": {"position"},
    "num_requests_waiting_by_reason": {"reason"},
    "engine_sleep_state": {"sleep_state"},
}  # fmt: skip
# Objectives that one chooses from there have to be bounds of buckets, written so.
ASKED_BOUNDS = {
    "time_to_first_token_seconds_bucket": ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0"),
    "request_time_per_output_token_seconds_bucket": ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5"),
}


def test_the_fields_dashboards_find_what_they_ask_for() -> None:
    metrics = EngineMetrics("m", 4096)
    metrics.counts = lambda: Counts(scheduled=Counters(accepted_at=[1]))
    labels: dict[str, set[str]] = {}
    bounds: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels[sample.name] = set(sample.labels)
            bounds.setdefault(sample.name, set()).add(sample.labels.get("le", ""))
    for name, asked in ASKED_BY_FIELD.items():
        assert labels["vllm:" + name] == asked | {"model_name", "engine"}, name
    for name, asked in ASKED_BOUNDS.items():
        assert bounds["vllm:" + name] >= set(asked), name


def test_model_name_is_escaped_and_openmetrics_works() -> None:
    metrics = EngineMetrics('a"b\nc', 16)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert families[0].samples[0].labels["model_name"] == 'a"b\nc'
    assert openmetrics(metrics).endswith(b"# EOF\n")


def test_launched_steps_give_the_graph_ratio_and_padding() -> None:
    metrics = EngineMetrics("m", 100)
    assert 'graph_hit_ratio{engine="0",model_name="m"} 0.0' in metrics.render().decode()
    metrics.counts = lambda: Counts(launched=StepCounts(steps=8, graphed=6, tokens=100, padding=25))
    text = metrics.render().decode()
    for line in ("graph_hit_ratio{%s} 0.75", "engine_steps_total{%s} 8.0", "engine_padding_tokens_total{%s} 25.0"):
        assert line % 'engine="0",model_name="m"' in text


def test_steps_are_counted_by_bucket() -> None:
    counts = StepCounts()
    counts.launched(5, 8, graphed=True)
    counts.launched(3, 3, graphed=False)
    assert (counts.steps, counts.graphed, counts.tokens, counts.padding) == (2, 1, 8, 3)


def test_what_limits_the_prompt_tokens_of_steps_is_shown() -> None:
    metrics = EngineMetrics("m", 100)
    metrics.counts = lambda: Counts(chunks=ChunkCounts(17.5, {"target": 4, "backlog": 2, "budget": 1}))
    text = metrics.render().decode()
    assert 'pagegraph:step_target_seconds{engine="0",model_name="m"} 0.0175' in text
    for limit, count in (("target", 4.0), ("backlog", 2.0), ("budget", 1.0)):
        assert f'pagegraph:chunked_steps_total{{engine="0",limit="{limit}",model_name="m"}} {count}' in text


def test_graph_misses_are_counted_by_reason() -> None:
    metrics, counts = EngineMetrics("m", 100), StepCounts()
    counts.missed_graph("too_many_tokens")
    metrics.counts = lambda: Counts(launched=counts)
    text = metrics.render().decode()
    for reason, value in (("too_many_tokens", 1.0), ("not_captured", 0.0)):
        assert f'pagegraph:graph_misses_total{{engine="0",model_name="m",reason="{reason}"}} {value}' in text


@pytest.mark.parametrize("state", ["off", "compiling", "compiled", "failed"])
def test_the_state_of_the_compilation_is_the_one_that_is_1(state: str) -> None:
    metrics = EngineMetrics("m", 100)
    metrics.compile_state = lambda: state
    (family,) = [
        one
        for one in text_string_to_metric_families(metrics.render().decode())
        if one.name == "pagegraph:compile_state"
    ]
    assert [sample.labels["state"] for sample in family.samples if sample.value] == [state] and len(family.samples) == 4


def test_what_the_kv_cache_is_like() -> None:
    metrics = EngineMetrics("m", 16)
    metrics.cache_config = {"block_size": "16", "num_gpu_blocks": "100"}
    told = b'vllm:cache_config_info{block_size="16",engine="0",model_name="m",num_gpu_blocks="100"} 1.0'
    assert told in metrics.render()


def test_samples_of_one_prompt_count_once_all_are_served() -> None:
    metrics, three = EngineMetrics("m", 4096), Samples(3)
    assert [three.served(tokens) for tokens in (7, 20, 3)] == [False, False, True]
    metrics.observe_samples(three.count, three.most_tokens)
    metrics.observe_samples(1, 5)
    got = samples(metrics)
    assert got["vllm:request_params_n_sum", ""] == 4 and got["vllm:request_params_n_bucket", "2.0"] == 1
    assert got["vllm:request_max_num_generation_tokens_sum", ""] == 25
