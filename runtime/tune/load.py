"""The workload through an engine in this process, each request at its time: what became of it, what the scheduler did.

Knows an engine and its messages; knows no builds and no search. Nothing of a web process is in the times.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from pagegraph.runtime.bench.outcome import Outcome
from pagegraph.runtime.bench.work import Request
from pagegraph.runtime.engine.engine import Engine
from pagegraph.runtime.engine.metrics import EngineMetrics
from pagegraph.runtime.ipc.protocol import Abort, Failed, Submit, TokenDelta, Tokens
from pagegraph.runtime.llm import LocalMailbox
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.spec_decode.proposer import NgramProposer
from pagegraph.runtime.tune.measurement import CannotRun, Counts

TEXTS = 64  # that are looked through for n-grams
NAP_S = 0.01  # at most, while nobody has come: the bar goes on


class Load:
    """One run of `requests`, whose prompts are token ids, at seconds `times` from its start."""

    def __init__(
        self,
        engine: Engine,
        metrics: EngineMetrics,
        mailbox: LocalMailbox,
        requests: Sequence[Request],
        times: Sequence[float],
        *,
        ignore_eos: bool,
        watch: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """watch: told the seconds since the start after each turn; what it raises ends the run."""
        self._engine, self._metrics, self._mailbox = engine, metrics, mailbox
        self._launched = metrics.counts().launched
        self._requests, self._ignore_eos, self._watch = requests, ignore_eos, watch
        self.outcomes = [Outcome() for _ in requests]
        self.duration = 0.0
        self._texts: list[list[int]] = [[] for _ in requests]  # prompt and answer
        self._last = [0.0] * len(requests)  # when each had its last token
        self._times = times
        self._followers: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            if request.follows is not None:
                self._followers[request.follows].append(number)
        self._due = [(times[number], number) for number, one in enumerate(requests) if one.follows is None]
        heapq.heapify(self._due)
        self._open: set[int] = set()
        self._running = self._waiting = self._step_tokens = 0
        self._blocks = 0.0

    def run(self) -> None:
        """Fills `outcomes` and `duration`. Raises CannotRun where a request is refused; the engine is idle afterwards."""
        self._begin = time.perf_counter()
        try:
            while self._due or self._open:
                self._send()
                if self._open:
                    self._turn()
                else:
                    time.sleep(min(NAP_S, max(0.0, self._due[0][0] - self._now())))
                self._watch(self._now())
        except BaseException:
            self._drain()
            raise
        self.duration = self._now()

    def counts(self, ngram: NgramProposer) -> Counts:
        """Of the run."""
        told = self._metrics.counts()
        steps = told.chunks.steps
        return Counts(
            running=self._running,
            waiting=self._waiting,
            step_tokens=self._step_tokens,
            blocks=self._blocks,
            preemptions=told.scheduled.preemptions,
            mixed_steps=sum(steps.values()),
            limited_steps=sum(count for limit, count in steps.items() if limit != "budget"),
            accepted=accepted_share(
                ngram, [(one.prompt_len, text) for one, text in zip(self.outcomes[:TEXTS], self._texts)]
            ),
        )

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    def _send(self) -> None:
        while self._due and self._due[0][0] <= self._now():
            arrived, number = heapq.heappop(self._due)
            request, outcome = self._requests[number], self.outcomes[number]
            assert isinstance(request.prompt, list)
            before = [] if request.follows is None else self._texts[request.follows]
            self._texts[number] = before + request.prompt
            outcome.start_time = self._begin + arrived
            outcome.prompt_len = len(self._texts[number])
            params = SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=self._ignore_eos)
            self._mailbox.put(Submit(request_id=str(number), token_ids=list(self._texts[number]), params=params))
            self._open.add(number)

    def _turn(self) -> None:
        scheduler, tokens = self._engine.scheduler, self._launched.tokens
        self._engine.turn()
        self._step_tokens = max(self._step_tokens, self._launched.tokens - tokens)
        self._running = max(self._running, scheduler.num_running)
        self._waiting = max(self._waiting, scheduler.num_waiting)
        self._blocks = max(self._blocks, scheduler.block_tables.pool.usage)
        now = time.perf_counter()
        for message in self._mailbox.take():
            match message:
                case Failed(message=text):
                    raise CannotRun(text)
                case Tokens():
                    for delta in message.each():
                        self._take(delta, now)

    def _take(self, delta: TokenDelta, now: float) -> None:
        number = int(delta.request_id)
        outcome = self.outcomes[number]
        if delta.token_ids:
            if outcome.output_tokens:
                outcome.itl.append(now - self._last[number])
            else:
                outcome.ttft = now - outcome.start_time
            self._last[number] = now
            outcome.latency = now - outcome.start_time
            outcome.output_tokens += len(delta.token_ids)
            self._texts[number] += delta.token_ids
        if delta.finish_reason:
            self._open.discard(number)
            for follower in self._followers[number]:
                heapq.heappush(self._due, (max(self._times[follower], now - self._begin), follower))

    def _drain(self) -> None:
        for number in self._open:
            self._mailbox.put(Abort(str(number)))
        while not self._engine.idle or self._mailbox.inbox:
            self._engine.turn()
        self._mailbox.take()


def accepted_share(ngram: NgramProposer, texts: Sequence[tuple[int, list[int]]]) -> float:
    """Of the tokens behind each prompt (length, prompt and answer), the share that n-gram draft tokens would have had accepted."""
    hits = total = 0
    for prompt_len, text in texts:
        tokens = np.asarray(text, np.int32)
        for place in range(max(prompt_len, 1), len(tokens)):
            at, _ = ngram.find(tokens[:place])
            hits += bool(at) and tokens[at] == tokens[place]
            total += 1
    return hits / total if total else 0.0
