"""The keys that are tried, and which values: what the best run's counters and the forecast leave of them.

Knows what each key does to a run; measures nothing. A key that is no matter on the device is no knob.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pagegraph.runtime.config import Config
from pagegraph.runtime.tune.measurement import Measurement
from pagegraph.runtime.tune.search import Knob, Tries

ROOM = 4  # times a size of steps that is tried at most
GAIN = 1.02  # times the rate: what the roofline gives less than is no gain
LOSS = 0.9
FULL = 0.95  # share of the blocks from which on they are short
READ = 0.1  # share of a decode step's bytes from which on smaller keys and values can matter
ACCEPTED = 0.1  # share of the answers' tokens from which on draft tokens can pay
ENOUGH_THREADS = 4  # from which on half of them may wait less for each other
GPU_SHARE = 0.95  # of a GPU's memory, that is tried where blocks are short
UNDER = 0.8  # of the objective between tokens: a target for steps that leaves room for those that take longer


class Forecast(Protocol):
    """What `runtime explain` says of this model on this machine."""

    def decode_rate(self, seqs: int) -> float:
        """Tokens a second at most, of steps of so many sequences that decode."""
        ...

    def prompt_rate(self, tokens: int) -> float:
        """Tokens a second at most, of steps of so many prompt tokens."""
        ...

    def cache_share(self, seqs: int) -> float:
        """Share of keys and values in the bytes of such a step, 0 to 1."""
        ...

    def refusal(self, config: Config) -> str:
        """Why the memory of a configuration does not fit; empty if it does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is known of the workload and the machine."""

    device: str  # cpu or cuda
    threads: int  # of the CPU, as PyTorch chooses
    made_up: bool
    shares_prefixes: bool  # two prompts have a first block in common, or a request follows another
    slos: Mapping[str, float]


def knobs(work: Work, forecast: Forecast, config: Config) -> list[Knob]:
    """In the order they are tried: what needs no other model first."""
    memory = (
        "num_blocks" if config.num_blocks is not None
        else "kv_cache_memory" if config.kv_cache_memory is not None or work.device == "cpu"
        else "gpu_memory_utilization"
    )  # fmt: skip
    rules = _Rules(work, forecast, memory)
    found = {
        "max_num_seqs": rules.max_num_seqs,
        "max_num_batched_tokens": rules.max_num_batched_tokens,
        "inter_token_target_ms": rules.inter_token_target_ms,
        "enable_prefix_caching": rules.enable_prefix_caching,
        memory: rules.memory,
        "speculative_method": rules.speculative_method,
        "kv_cache_dtype": rules.kv_cache_dtype,
    }
    if work.device == "cpu":
        found["num_threads"] = rules.num_threads
    return [Knob(key, tries, forecast.refusal) for key, tries in found.items()]


@dataclass(frozen=True, slots=True)
class _Rules:
    """One method a key."""

    work: Work
    forecast: Forecast
    memory_key: str

    def max_num_seqs(self, config: Config, run: Measurement) -> Tries:
        now, ran = config.max_num_seqs, run.counts.running
        directions, left_out = [], []
        if ran < now or not run.counts.waiting:
            left_out.append(f"more than {now}: at most {ran} ran at once, and {run.counts.waiting} waited")
        elif not self.work.slos and (reason := self._no_gain(now, 2 * now)):
            left_out.append(reason)
        else:
            directions.append(list(_doubled(now)))
        fewer = [n for n in (now // 2, now // 4) if 1 <= n < ran]
        if not fewer:
            left_out.append(f"fewer than {now}: at most {ran} ran at once")
        elif not self.work.slos and (rate := self.forecast.decode_rate(fewer[0])) < LOSS * (
            most := self.forecast.decode_rate(now)
        ):
            left_out.append(
                f"fewer than {now}: the roofline has {rate:.0f} tokens/s for {fewer[0]} sequences and {most:.0f} for {now}"
            )
        else:
            directions.append(fewer)
        return Tries(directions, left_out)

    def _no_gain(self, now: int, more: int) -> str:
        rate, then = self.forecast.decode_rate(now), self.forecast.decode_rate(more)
        if then >= GAIN * rate:
            return ""
        return f"more than {now}: the roofline has {then:.0f} tokens/s for {more} sequences and {rate:.0f} for {now}"

    def max_num_batched_tokens(self, config: Config, run: Measurement) -> Tries:
        now, largest = config.batched_tokens(self.work.device), run.counts.step_tokens
        directions, left_out = [], []
        rate, then = self.forecast.prompt_rate(now), self.forecast.prompt_rate(2 * now)
        if largest < now:
            left_out.append(f"more than {now}: the largest step had {largest} tokens")
        elif then < GAIN * rate:
            left_out.append(
                f"more than {now}: the roofline has {then:.0f} prompt tokens/s for steps of {2 * now} tokens,"
                f" and {rate:.0f} for {now}"
            )
        else:
            directions.append(list(_doubled(now)))
        fewer = [n for n in (now // 2, now // 4) if config.max_num_seqs <= n < largest]
        if fewer:
            directions.append(fewer)
        else:
            left_out.append(
                f"fewer than {now}: the largest step had {largest} tokens, and max_num_seqs={config.max_num_seqs} needs as many"
            )
        return Tries(directions, left_out)

    def inter_token_target_ms(self, config: Config, run: Measurement) -> Tries:
        now, counts = config.inter_token_target_ms, run.counts
        if now != "none" and not counts.mixed_steps:
            return Tries(left_out=["no step had decodes while prompts waited"])
        if now == "none" and counts.running < 2:
            return Tries(left_out=["requests ran one after the other"])
        limits = [limit for name, limit in self.work.slos.items() if name in ("itl", "tpot")]
        values: list[float | str] = [round(UNDER * min(limits), 1)] if limits else []
        left_out = []
        if now == "none" or counts.limited_steps:
            values += ["auto", "none"]
        else:
            left_out.append(
                f"none: it cut no prompt in {counts.mixed_steps} steps that had decodes while prompts waited"
            )
        return Tries([[value] for value in values if value != now], left_out)

    def enable_prefix_caching(self, config: Config, run: Measurement) -> Tries:
        if not self.work.shares_prefixes:
            return Tries(
                left_out=[f"no two prompts have the same first {config.block_size} tokens: nothing can be found"]
            )
        return Tries([[not config.enable_prefix_caching]])

    def memory(self, config: Config, run: Measurement) -> Tries:
        counts = run.counts
        if counts.blocks < FULL and not counts.preemptions:
            return Tries(left_out=[f"at most {counts.blocks:.0%} of the blocks were in use, and nothing was preempted"])
        if self.memory_key == "num_blocks":
            assert config.num_blocks is not None
            return Tries([list(_doubled(config.num_blocks))])
        if self.memory_key == "kv_cache_memory":
            return Tries([list(_doubled(config.cpu_kv_cache_memory()))])
        if config.gpu_memory_utilization >= GPU_SHARE:
            return Tries(left_out=[f"more than {config.gpu_memory_utilization}: the rest is the driver's"])
        return Tries([[GPU_SHARE]])

    def speculative_method(self, config: Config, run: Measurement) -> Tries:
        if config.method is not None:
            if config.speculative_model is not None:
                return Tries(left_out=[f"{config.method} has a draft model, which was chosen by hand"])
            return Tries([[None]])
        if self.work.made_up:
            return Tries(left_out=["made-up prompts do not tell how answers repeat; give a dataset of real ones"])
        if run.counts.accepted < ACCEPTED:
            return Tries(left_out=[f"n-grams would have guessed {run.counts.accepted:.0%} of the answers' tokens"])
        return Tries([["ngram"]])

    def kv_cache_dtype(self, config: Config, run: Measurement) -> Tries:
        if config.kv_cache_dtype != "auto":
            return Tries([["auto"]])
        share = self.forecast.cache_share(max(run.counts.running, 1))
        if share < READ and run.counts.blocks < FULL and not run.counts.preemptions:
            return Tries(
                left_out=[f"keys and values are {share:.0%} of the bytes of a step, and there were blocks enough"]
            )
        return Tries([["fp8"]])

    def num_threads(self, config: Config, run: Measurement) -> Tries:
        now = config.num_threads or self.work.threads
        if now < ENOUGH_THREADS:
            return Tries(left_out=[f"there are {now}: with fewer, products take as much longer"])
        return Tries([[now // 2]])


def _doubled(now: Any) -> Iterator[int]:
    """Twice as much, and so on."""
    value = 2 * now
    while value <= ROOM * now:
        yield value
        value *= 2
