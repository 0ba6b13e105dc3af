"""The search over a scripted bench: what it finds, keeps, prunes, and when it stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from pagegraph.runtime.config import Config
from pagegraph.runtime.tune.knobs import Work, knobs
from pagegraph.runtime.tune.measurement import Objective, OutOfTime
from pagegraph.runtime.tune.search import Found, Search
from tests.runtime.tune.scripted import BUSY, RoomForAll, ScriptedBench, counts, measurement

CONFIG = Config(model="tiny", device="cpu", max_num_seqs=32, max_num_batched_tokens=512, kv_cache_memory=1 << 20)
WORK = Work(device="cpu", threads=8, made_up=False, shares_prefixes=True, slos={"ttft": 500.0, "itl": 50.0})
GAINS: dict[str, Mapping[object, float]] = {
    "max_num_seqs": {64: 1.2, 128: 1.1, 16: 0.8},
    "max_num_batched_tokens": {1024: 0.9, 256: 1.3, 128: 1.5},
    "inter_token_target_ms": {"none": 0.7, 40.0: 1.2},
    "enable_prefix_caching": {False: 0.5},
    "kv_cache_memory": {2 << 20: 1.4, 4 << 20: 1.41},
    "speculative_method": {"ngram": 1.3},
    "kv_cache_dtype": {"fp8": 0.9},
    "num_threads": {4: 1.1},
}
BEST = dict(
    max_num_seqs=64, max_num_batched_tokens=128, inter_token_target_ms=40.0, kv_cache_memory=2 << 20,
    speculative_method="ngram", num_threads=4,
)  # fmt: skip


def search(
    bench: ScriptedBench, *, work: Work = WORK, forecast: RoomForAll | None = None, config: Config = CONFIG,
    slos: Mapping[str, float] = WORK.slos, repeats: int = 3,
) -> Found:  # fmt: skip
    made = knobs(work, forecast or RoomForAll(), config)
    return Search(bench, Objective(slos), made, repeats=repeats).run(config)


def test_finds_the_planted_best() -> None:
    found = search(ScriptedBench(GAINS))
    assert {key: change.after for key, change in found.changes.items()} == BEST
    assert found.config == dataclasses.replace(CONFIG, **BEST)
    assert found.best.figures["request_goodput"] == pytest.approx(100 * 1.2 * 1.5 * 1.2 * 1.4 * 1.3 * 1.1)
    assert not found.not_reached


def test_a_change_says_what_it_was_measured_against() -> None:
    change = search(ScriptedBench(GAINS)).changes["max_num_batched_tokens"]
    assert (change.before, change.after) == (512, 128)  # over 256
    assert change.best.figures["request_goodput"] == pytest.approx(120)
    assert change.run.figures["request_goodput"] == pytest.approx(180)


def test_nothing_better_leaves_the_configuration() -> None:
    found = search(ScriptedBench({}))
    assert found.config == CONFIG and found.best is found.baseline and not found.changes
    assert {one.outcome for one in found.tried} == {"no better"}


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_kept(seed: int) -> None:
    """Every run differs by up to 10 % and no setting matters."""
    noise = iter(np.random.default_rng(seed).uniform(0.9, 1.1, 200).tolist())
    found = search(ScriptedBench({}, noise=noise), repeats=5)
    assert not found.changes, found.tried


def test_a_lucky_run_is_measured_again() -> None:
    """1.3 once, behind three runs of the baseline; then the best again, and 1."""
    bench = ScriptedBench({}, noise=iter([1.0, 1.01, 0.99, 1.3]))
    found = search(bench)
    assert found.tried[0].outcome == "noise" and not found.changes


def test_a_machine_that_became_faster_is_no_gain() -> None:
    bench = ScriptedBench({}, noise=iter([1.0, 1.0, 1.0] + [1.5] * 100))
    assert not search(bench).changes


def test_a_gain_below_the_spread_is_not_kept() -> None:
    gains = {"num_threads": {4: 1.1}}
    assert "num_threads" in search(ScriptedBench(gains)).changes
    found = search(ScriptedBench(gains, noise=iter([0.9, 1.0, 1.1])))
    assert found.spread.value == pytest.approx(0.2) and not found.changes


def test_equal_goodput_is_settled_by_the_tail() -> None:
    def tail(config: Config) -> float:
        return 60.0 if config.num_threads == 4 else 100.0

    assert list(search(ScriptedBench({}, tail=tail)).changes) == ["num_threads"]
    worse = {"num_threads": {4: 0.9}}
    assert not search(ScriptedBench(worse, tail=tail)).changes


def test_goodput_that_was_none_at_all_can_be_raised() -> None:
    class Nothing(ScriptedBench):
        def value(self, config: Config) -> float:
            return 3.0 if config.max_num_seqs == 16 else 0.0

    assert search(Nothing({})).changes["max_num_seqs"].after == 16


@pytest.mark.parametrize("budget_s", [30, 45, 75, 120, 170])
def test_the_budget_is_kept(budget_s: float) -> None:
    bench = ScriptedBench(GAINS, budget_s=budget_s)
    found = search(bench)
    assert bench.clock <= budget_s and found.not_reached
    assert all(getattr(found.config, key) == change.after for key, change in found.changes.items())


def test_a_budget_below_the_baseline_finds_nothing() -> None:
    with pytest.raises(OutOfTime):
        search(ScriptedBench({}, budget_s=25))


def test_a_run_that_takes_too_long_is_given_up() -> None:
    bench = ScriptedBench({}, slow=lambda config: config.max_num_seqs == 64)
    found = search(bench)
    assert found.tried[0].outcome == "given up" and bench.clock < 400


def test_what_does_not_fit_is_not_tried() -> None:
    def refuses(config: Config) -> str:
        return "it would take 9 GiB" if config.kv_cache_memory != 1 << 20 else ""

    bench = ScriptedBench(GAINS)
    found = search(bench, forecast=RoomForAll(refuses=refuses))
    assert all(config.kv_cache_memory == 1 << 20 for config in bench.measured)
    one = next(one for one in found.tried if one.key == "kv_cache_memory")
    assert (one.outcome, one.reason) == ("cannot run", "it would take 9 GiB")


def test_what_the_configuration_refuses_is_not_tried() -> None:
    bench = ScriptedBench(GAINS)
    found = search(bench, config=dataclasses.replace(CONFIG, max_num_batched_tokens=32))
    assert found.tried[0].outcome == "cannot run" and "exceeds max_num_batched_tokens=32" in found.tried[0].reason
    assert not any(config.max_num_seqs == 64 and config.max_num_batched_tokens == 32 for config in bench.measured)


@pytest.mark.parametrize(
    "key, run, forecast, work, reason",
    [
        ("max_num_seqs", counts(running=12, waiting=0), {}, {}, "at most 12 ran at once"),
        ("max_num_seqs", BUSY, {"gain": 1.0}, {"slos": {}}, "the roofline has"),
        ("max_num_batched_tokens", counts(step_tokens=200), {}, {}, "the largest step had 200 tokens"),
        ("max_num_batched_tokens", BUSY, {"gain": 1.0}, {}, "prompt tokens/s for steps of 1024"),
        ("inter_token_target_ms", counts(mixed_steps=0), {}, {}, "no step had decodes while prompts waited"),
        ("inter_token_target_ms", counts(limited_steps=0), {}, {}, "it cut no prompt in 50 steps"),
        ("enable_prefix_caching", BUSY, {}, {"shares_prefixes": False}, "the same first 16 tokens"),
        ("kv_cache_memory", counts(blocks=0.3, preemptions=0), {}, {}, "at most 30% of the blocks"),
        ("speculative_method", BUSY, {}, {"made_up": True}, "made-up prompts"),
        ("speculative_method", counts(accepted=0.04), {}, {}, "would have guessed 4%"),
        ("kv_cache_dtype", counts(blocks=0.3, preemptions=0), {"share": 0.02}, {}, "are 2% of the bytes"),
        ("num_threads", BUSY, {}, {"threads": 2}, "there are 2"),
    ],
)
def test_a_key_that_cannot_matter_is_left_out_with_the_reason(key, run, forecast, work, reason) -> None:
    made = {one.key: one for one in knobs(dataclasses.replace(WORK, **work), RoomForAll(**forecast), CONFIG)}
    tries = made[key].tries(CONFIG, measurement(1.0, counts=run))
    assert any(reason in one for one in tries.left_out), tries
    everything = {one.key: one for one in knobs(WORK, RoomForAll(), CONFIG)}[key].tries(CONFIG, measurement(1.0))
    assert sum(map(len, everything.directions)) > sum(map(len, tries.directions))


def test_keys_of_the_device_alone() -> None:
    gpu = dataclasses.replace(WORK, device="cuda")
    keys = [one.key for one in knobs(gpu, RoomForAll(), Config(model="tiny"))]
    assert "gpu_memory_utilization" in keys and not {"num_threads", "kv_cache_memory", "num_blocks"} & set(keys)
    assert "num_blocks" in [one.key for one in knobs(WORK, RoomForAll(), Config(model="tiny", num_blocks=99))]
