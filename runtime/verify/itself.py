"""The engine against itself: ways to run the same greedy requests that may not change what comes of them.

Every way is the same built model under another scheduling configuration. Knows the offline API; knows no transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from pagegraph.compiler.build import BuiltModel
from pagegraph.runtime.config import Config
from pagegraph.runtime.llm import LLM, Completion
from pagegraph.runtime.sampling_params import SamplingParams

CHUNK = 16  # tokens of a step, where prompts are to be chunked
PREEMPTED = 6  # the shortest prompts, which are made to run out of blocks
DRAFT_TOKENS = 4  # a sequence and step, where the configuration leaves it open

Prompts = Sequence[list[int]]


@dataclass(frozen=True, slots=True)
class Equality:
    """A way to run, against the plain one. Tokens are compared up to the first that differs in each prompt."""

    name: str
    happened: str  # what shows that it ran this way; "" where it could not be made to
    prompts: int
    differing: list[tuple[int, int, float]]  # prompt, place, margin of the two likeliest tokens there
    errors: list[float]  # differences in the log-probability of each token; none where they were not asked for


class Itself:
    """All ways, each asked for `num_tokens` of each prompt."""

    def __init__(self, config: Config, built: BuiltModel, prompts: Prompts, num_tokens: int) -> None:
        """config: with the speculation that `built` was built for, if any."""
        self._drafting = config
        self._config = replace(config, speculative_method=None, speculative_model=None)
        self._built, self._prompts = built, prompts
        self._params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=2)
        self._plain = self._run(LLM(self._config, built=built))

    @property
    def token_ids(self) -> list[list[int]]:
        """Of the plain run: all prompts at once, steps as large as the configuration lets them be."""
        return [one.token_ids for one in self._plain]

    def ways(self) -> list[Callable[[], Equality]]:
        """Each runs when it is called."""
        return [self.silent, self.alone, self.chunked, self.cached, self.preempted, self.speculative]

    def silent(self) -> Equality:
        """Without log-probabilities: tokens are then those that are sampled with the forward, in its graph."""
        llm, params = LLM(self._config, built=self._built), msgspec.structs.replace(self._params, logprobs=None)
        got = llm.generate(list(self._prompts), params)
        return self._compared("without log-probabilities against with", "sampled with the forward", got)

    def alone(self) -> Equality:
        """One prompt at a time."""
        got = self._run(LLM(replace(self._config, max_num_seqs=1), built=self._built))
        return self._compared("one by one against batched", "1 sequence a step", got)

    def chunked(self) -> Equality:
        """Prompts over several steps."""
        chunks = sum(len(prompt) > CHUNK for prompt in self._prompts)
        name = "chunked prefill against whole"
        if not chunks or not self._config.enable_chunked_prefill:
            return self._not_run(name)
        seqs = min(self._config.max_num_seqs, CHUNK)
        got = self._run(LLM(replace(self._config, max_num_batched_tokens=CHUNK, max_num_seqs=seqs), built=self._built))
        return self._compared(name, f"{chunks} prompts in chunks of up to {CHUNK} tokens", got)

    def cached(self) -> Equality:
        """The same prompts once more."""
        name = "prefix cache hit against cold"
        llm = LLM(replace(self._config, enable_prefix_caching=True), built=self._built)
        self._run(llm)
        got = self._run(llm)
        found = sum(one.cached_tokens for one in got)
        return self._compared(name, f"{found} prompt tokens found", got) if found else self._not_run(name)

    def preempted(self) -> Equality:
        """Too few blocks for all sequences to end: some are computed anew."""
        name, size = "preempted against not", self._config.block_size
        some = sorted(range(len(self._prompts)), key=lambda at: len(self._prompts[at]))[:PREEMPTED]
        lengths = [len(self._prompts[at]) for at in some]
        longest = max(lengths) + int(self._params.max_tokens or 0)
        blocks = max(sum(-(-one // size) for one in lengths) + 1, -(-longest // size))  # one is spare while others run
        tight = replace(self._built, num_blocks=blocks + 1, max_model_len=min(self._built.max_model_len, blocks * size))
        llm = LLM(self._config, built=tight)
        got = self._run(llm, [self._prompts[at] for at in some])
        times = llm.engine.scheduler.counters.preemptions
        return self._compared(name, f"{times} preemptions", got, some) if times else self._not_run(name)

    def speculative(self) -> Equality:
        """With draft tokens."""
        name = f"speculative ({self._drafting.method}) against not"
        llm = LLM(self._drafting, built=self._built)
        got = self._run(llm)
        counters = llm.engine.scheduler.counters
        said = f"{counters.accepted} of {counters.draft_tokens} draft tokens accepted"
        return self._compared(name, said, got) if counters.draft_tokens else self._not_run(name)

    def _run(self, llm: LLM, prompts: Prompts | None = None) -> list[Completion]:
        done = llm.generate(list(self._prompts if prompts is None else prompts), self._params)
        llm.engine.scheduler.check_integrity()
        return done

    def _compared(
        self, name: str, happened: str, got: list[Completion], which: Sequence[int] | None = None
    ) -> Equality:
        which = range(len(self._prompts)) if which is None else which
        differing, errors = [], []
        for at, one in zip(which, got, strict=True):
            plain = self._plain[at]
            same = first_difference(plain.token_ids, one.token_ids)
            for ours, theirs in zip(plain.logprobs[:same], one.logprobs[:same]):
                far = abs(ours.logprob - theirs.logprob)
                errors.append(math.inf if math.isnan(far) else far)
            if same is not None:
                differing.append((at, same, _margin(plain, same)))
        return Equality(name, happened, len(got), differing, errors)

    def _not_run(self, name: str) -> Equality:
        return Equality(name, "", 0, [], [])


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which they differ; None where they are the same."""
    if list(one) == list(other):
        return None
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _margin(done: Completion, place: int) -> float:
    """Between the two likeliest tokens; infinite where one text is only longer than the other."""
    if place >= len(done.logprobs):
        return math.inf
    best, second = done.logprobs[place].top_logprobs[:2]
    return best - second
