"""A bench whose runs are a function of the configuration, on a clock of its own; counters of a run that was short of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from pagegraph.runtime.config import Config
from pagegraph.runtime.tune.measurement import Counts, Measurement, OutOfTime, TooSlow

BUSY = Counts(
    running=32, waiting=9, step_tokens=512, blocks=1.0, preemptions=3, mixed_steps=50, limited_steps=20, accepted=0.5
)


def measurement(
    value: float, *, tail: float = 100.0, seconds: float = 10.0, counts: Counts = BUSY, **figures: float
) -> Measurement:
    """Of so much goodput or tokens a second; `tail` milliseconds are the p99 of everything."""
    found = dict.fromkeys(("p99_ttft_ms", "p99_itl_ms", "p99_tpot_ms", "p99_e2el_ms"), tail)
    given = dict(request_goodput=value, output_throughput=value, duration=seconds)
    return Measurement(found | given | figures, counts, 1 << 20)


class ScriptedBench:
    """`gains`: key -> value -> factor on the value. `noise`: factors that runs are multiplied by in turn, 1 behind them."""

    def __init__(
        self,
        gains: Mapping[str, Mapping[object, float]],
        *,
        noise: Iterator[float] = iter(()),
        budget_s: float = 1e9,
        run_s: float = 10.0,
        slow: Callable[[Config], bool] = lambda config: False,
        tail: Callable[[Config], float] = lambda config: 100.0,
    ) -> None:
        self.gains, self.noise, self.budget_s, self.run_s, self.slow, self.tail = (
            gains,
            noise,
            budget_s,
            run_s,
            slow,
            tail,
        )
        self.clock = 0.0
        self.measured: list[Config] = []

    def value(self, config: Config) -> float:
        value = 100.0
        for key, factors in self.gains.items():
            value *= factors.get(getattr(config, key), 1.0)
        return value

    def measure(self, config: Config, limit_s: float | None) -> Measurement:
        seconds = 10 * self.run_s if self.slow(config) else self.run_s
        taken = min(seconds, limit_s or seconds)
        if self.clock + taken > self.budget_s:
            raise OutOfTime
        self.clock += taken
        self.measured.append(config)
        if taken < seconds:
            raise TooSlow
        return measurement(self.value(config) * next(self.noise, 1.0), tail=self.tail(config), seconds=self.run_s)

    def has_model(self, config: Config) -> bool:
        return True


class RoomForAll:
    """A forecast in which everything fits and larger steps pay; `changed` is what it says otherwise."""

    def __init__(
        self, gain: float = 1.5, share: float = 0.5, refuses: Callable[[Config], str] = lambda config: ""
    ) -> None:
        self.gain, self.share, self.refusal = gain, share, refuses

    def decode_rate(self, seqs: int) -> float:
        return 100 * self.gain ** (seqs.bit_length() - 1)

    def prompt_rate(self, tokens: int) -> float:
        return self.decode_rate(tokens)

    def cache_share(self, seqs: int) -> float:
        return self.share


def counts(**changed: float) -> Counts:
    return replace(BUSY, **changed)
