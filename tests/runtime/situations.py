"""Situations in which one request may be computed: what else runs, how prompts are cut, what is cached, drafted, preempted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.step.state import NgramRange
from pagegraph.runtime.config import Config
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM, Completion

BLOCK_SIZE = 8
MAX_MODEL_LEN = 80
MOST_DRAFTS = 4


@dataclass(frozen=True)
class Situation:
    """How a list of requests is run."""

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    draft_tokens: int
    tight: bool  # so few blocks that sequences are preempted
    twice: bool  # the second time prompts are cached, if anything is
    order: int  # seed of the order of arrival


SITUATIONS = st.builds(
    Situation,
    max_num_seqs=st.sampled_from([1, 2, 3, 8]),
    max_num_batched_tokens=st.sampled_from([8, 13, 32, 100, 512]),
    enable_prefix_caching=st.booleans(),
    draft_tokens=st.integers(0, MOST_DRAFTS),
    tight=st.booleans(),
    twice=st.booleans(),
    order=st.integers(0, 100),
)
ALONE = Situation(1, 512, False, 0, tight=False, twice=False, order=0)  # one after the other, each prompt at once
ALL_AT_ONCE = Situation(8, 32, True, 3, tight=True, twice=True, order=1)


def draw_requests(seed: int, count: int, vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts, some of which begin alike and some of which repeat themselves, greedy or seeded."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, vocab_size, 24).tolist()
    requests = []
    for index in range(count):
        own = rng.integers(3, vocab_size, rng.integers(1, 24)).tolist()
        prompt = [shared[: rng.integers(8, 25)] + own, own, own[:6] * 4][index % 3]
        warm = (
            dict(temperature=1.0, seed=index, top_p=0.9 if index % 4 == 1 else 1.0)
            if index % 2
            else dict(temperature=0.0)
        )
        tokens = int(rng.integers(4, 32))
        requests.append((prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=2, **warm)))
    return requests


class Comparer:
    """Runs requests over one built model and compares every token, with its log-probabilities, with the request run alone."""

    def __init__(self, built: BuiltModel, config_of: Callable[..., Config]) -> None:
        self.built = built
        self._config_of = config_of
        self.compared = self.different = self.preempted = self.cached = self.drafted = self.accepted = 0

    def compare(self, requests: list[tuple[list[int], SamplingParams]], situation: Situation) -> None:
        """Add up what is equal and what is not."""
        expected = self._run(requests, ALONE)
        order = np.random.default_rng(situation.order).permutation(len(requests))
        got = self._run([requests[at] for at in order], situation)
        for at, mine in zip(order, got, strict=True):
            for one, other in zip(_tokens(mine), _tokens(expected[at]), strict=True):
                self.compared += 1
                self.different += one != other

    def prepare(self, how: Situation) -> Config:
        """Let the model draft as it asks -> its configuration, `tight` and all after it left aside."""
        speculative = {}
        if how.draft_tokens:
            speculative = dict(speculative_method="ngram", num_speculative_tokens=how.draft_tokens)
        self.built.step.state.allow_drafts(how.draft_tokens, NgramRange(2, 5) if how.draft_tokens else None)
        return self._config_of(
            max_num_seqs=min(how.max_num_seqs, how.max_num_batched_tokens), enable_prefix_caching=how.enable_prefix_caching,
            max_num_batched_tokens=how.max_num_batched_tokens, **speculative,
        )  # fmt: skip

    def _run(self, requests: list[tuple[list[int], SamplingParams]], how: Situation) -> list[Completion]:
        built = self.built
        if how.tight:
            built = dataclasses.replace(built, num_blocks=-(-MAX_MODEL_LEN // BLOCK_SIZE) + 1)
        llm = LLM(self.prepare(how), built=built)
        prompts, params = [one for one, _ in requests], [one for _, one in requests]
        for _ in range(1 + how.twice):
            done = llm.generate(prompts, params)
        counters = llm.engine.scheduler.counters
        self.preempted += counters.preemptions
        self.drafted += counters.draft_tokens
        self.accepted += counters.accepted
        self.cached += sum(one.cached_tokens for one in done)
        return done


def _tokens(completion: Completion) -> list[tuple]:
    return [
        (id, one.token_id, one.logprob, one.rank, one.top_ids, one.top_logprobs)
        for id, one in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
