"""From a configuration and a workload to what the search found: the order of things, and what is refused before it.

Knows no flags, no file and no printing. Loads the compiler before torch, which reads OpenMP's spin count once.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pagegraph.compiler.build import plan_models
from pagegraph.runtime.bench.arrivals import arrival_times
from pagegraph.runtime.bench.work import Request
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.tune.engines import Engines, Workload
from pagegraph.runtime.tune.forecast import Explained
from pagegraph.runtime.tune.knobs import Work, knobs
from pagegraph.runtime.tune.measurement import Objective, OutOfTime
from pagegraph.runtime.tune.search import Found, Search

ALONE = 3  # runs of one request, of which the best counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for beside the configuration and the work. rate: requests a second; None: what the baseline can do.
    The budget of seconds counts from `started` on, on `time.monotonic`.
    """

    objective: Objective
    rate: float | None
    burstiness: float
    started: float
    budget_s: float
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What was found, under which load."""

    found: Found
    objective: Objective
    rate: float
    seconds: float
    machine: str

    def as_json(self) -> dict[str, Any]:
        """Plain values under the names of `runtime bench serve`."""
        found = self.found
        return {
            "machine": self.machine,
            "slos": dict(self.objective.slos),
            "objective": self.objective.name,
            "request_rate": "inf" if math.isinf(self.rate) else self.rate,
            "seconds": self.seconds,
            "spread": found.spread.value,
            "tail_spread": found.spread.tail,
            "baseline_values": found.spread.values,
            "baseline": found.baseline.as_json(),
            "tuned": found.best.as_json(),
            "changes": {
                key: {"before": one.before, "after": one.after, "best": one.best.as_json(), "run": one.run.as_json()}
                for key, one in found.changes.items()
            },
            "tried": [
                {"key": one.key, "value": one.value, "outcome": one.outcome, "reason": one.reason,
                 "run": None if one.run is None else one.run.as_json()}
                for one in found.tried
            ],
            "left_out": [{"key": key, "reason": reason} for key, reason in found.left_out],
            "not_reached": found.not_reached,
        }  # fmt: skip


def tune(
    config: Config,
    work_for: Callable[[int], tuple[list[Request], list[Request]]],
    *,
    made_up: bool,
    asked: Asked,
    say: Callable[[str], None] = lambda line: None,
    tick: Callable[[], object] = lambda: None,
) -> Tuned:
    """Search. `work_for` a size of the vocabulary gives the requests, whose prompts are ids, and others to warm up with.
    `say` is told each result in a line, `tick` is called all along.

    Raises ValueError for an objective that cannot be met, a budget that is too short, and what a start raises.
    """
    slos = asked.objective.slos
    say("planning the model")
    [model, *_] = plan_models(compiler_options(config))
    requests, warmups = work_for(model.vocab_size)
    _check_lengths(requests, model.max_model_len)
    lengths = [len(one.prompt) + one.output_len for one in requests]
    explained = Explained(config, sum(lengths) // len(lengths))
    work = Workload(requests=requests, times=[0.0] * len(requests), warmups=warmups, ignore_eos=made_up)
    with closing(Engines(work, asked.objective, asked.started + asked.budget_s, tick)) as engines:
        try:
            say("building the model")
            if slos:
                _check_reach(engines, explained, config, requests, slos)
            rate = asked.rate
            if rate is None and slos:
                all_at_once = engines.measure(config, None).figures
                rate = float(f"{all_at_once['request_throughput']:.2g}")
                say(f"all at once, {rate:g} requests/s are answered: they come at that rate")
            rate = math.inf if rate is None else rate
            times = arrival_times(len(requests), rate, burstiness=asked.burstiness, seed=config.seed).tolist()
            engines.workload = dataclasses.replace(work, times=times)
            facts = Work(
                device=compiler_options(config).device.type,
                threads=engines.threads,
                made_up=made_up,
                shares_prefixes=_shares_prefixes(requests, config.block_size),
                slos=slos,
            )
            search = Search(engines, asked.objective, knobs(facts, explained, config), repeats=asked.repeats, say=say)
            found = search.run(config)
        except OutOfTime:
            raise ValueError(
                f"--budget of {asked.budget_s:g} s was over before the baseline had run {asked.repeats} times: give more,"
                f" such as --budget {2 * asked.budget_s:g}s, or less work with --num-prompts"
            ) from None
    return Tuned(
        found=found, objective=asked.objective, rate=rate, seconds=time.monotonic() - asked.started,
        machine=explained.machine.name,
    )  # fmt: skip


def _check_lengths(requests: Sequence[Request], max_model_len: int) -> None:
    """Raise ValueError for work with a request, or a conversation, that is longer than the model's limit."""
    ends: list[int] = []
    for number, one in enumerate(requests):
        before = 0 if one.follows is None else ends[one.follows]
        ends.append(before + len(one.prompt) + one.output_len)
        if ends[-1] > max_model_len:
            raise ValueError(
                f"the workload does not fit: request {number} of it has {ends[-1] - one.output_len} tokens and asks for"
                f" {one.output_len}, which is more than max_model_len={max_model_len}; raise that, or give shorter work"
                " with --input-len and --output-len"
            )


def _check_reach(
    engines: Engines, explained: Explained, config: Config, requests: Sequence[Request], slos: Mapping[str, float]
) -> None:
    """Raise ValueError if the shortest request misses an objective with nothing beside it."""
    shortest = min((one for one in requests if one.follows is None), key=lambda one: (len(one.prompt), one.output_len))
    taken = engines.alone(config, shortest, ALONE)
    for name, limit in slos.items():
        if taken[name] <= limit:
            continue
        tokens = len(shortest.prompt)
        floors = {"ttft": explained.prompts(tokens), "itl": explained.decode(1), "tpot": explained.decode(1)}
        why = "; see its parts with --slo ttft=... and itl=..."
        if one := floors.get(name):
            what = f"a step of {tokens} prompt tokens" if name == "ttft" else "a step of one sequence"
            floor = 1e3 * one.floor_s
            out = "so that no setting gets there" if floor > limit else "so that other settings may not be enough"
            why = (
                f"; the roofline has {floor:.3g} ms for {what}, bound by {one.bound}, {out}: {_remedy(name, one.bound)}"
            )
        raise ValueError(
            f"--slo {name}={limit:g} is missed by one request alone: the shortest, of {tokens} tokens, takes"
            f" {taken[name]:.1f} ms, {taken[name] / limit:.1f} times as long{why}"
        )


def _remedy(name: str, bound: str) -> str:
    if name == "ttft" and bound == "compute":
        return "take a smaller model, shorter prompts or a faster device, or allow more"
    return "take a smaller or a quantised model (quantization: int8 or int4) or a faster device, or allow more"


def _shares_prefixes(requests: Sequence[Request], block_size: int) -> bool:
    """Whether some request could find its first block, or what it goes on with, in the cache."""
    if any(one.follows is not None for one in requests):
        return True
    firsts = [tuple(one.prompt[:block_size]) for one in requests if len(one.prompt) > block_size]
    return len(set(firsts)) < len(firsts)
