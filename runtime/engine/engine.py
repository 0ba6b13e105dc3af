"""The engine loop: messages in, one step launched ahead, tokens out.

Step N+1 is scheduled and launched before the ids of step N are read, so the device never waits for the host, except
when the host proposes draft tokens: then the results of step N are awaited first. An exception ends one request: all
sequences run again from their committed tokens, one at a time until it is known which of them raises it. It ends the
engine only if a step of the engine's own fails too. A `client` is a web process, which owns the sequences that it
submitted; HTTP clients are its business. Holds no socket and no CUDA: the mailbox, the step and the clock are given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pagegraph.compiler.step.step import CompiledStep, RanksLost, Ticket
from pagegraph.runtime.engine.account_book import Book
from pagegraph.runtime.engine.admission import Admission
from pagegraph.runtime.engine.cache_watch import CacheWatch
from pagegraph.runtime.engine.fault_isolation import FaultIsolation
from pagegraph.runtime.engine.grammars import Grammars
from pagegraph.runtime.engine.limits import Limits
from pagegraph.runtime.engine.stats import EngineStats
from pagegraph.runtime.engine.throughput import Throughput
from pagegraph.runtime.grammar.step_masks import Refused
from pagegraph.runtime.ipc.protocol import (
    Abort,
    EngineInfo,
    Failed,
    Hello,
    ListRecent,
    Recent,
    Submit,
    SubmitGroup,
    ToClient,
    ToEngine,
    Tokens,
    WatchCache,
)
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.pack import Packer
from pagegraph.runtime.scheduler.plan import Plan
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.scheduler.step_time import StepLoad
from pagegraph.runtime.spec_decode.drafter import Drafter

log = logging.getLogger("pagegraph.engine")

MAX_FAILED_STEPS = 3  # of the engine's own, in a row, after which the device is held for broken


class Mailbox(Protocol):
    """Where messages come from and go to; `runtime.ipc.mailbox.Mailbox` over sockets, `runtime.llm` in process."""

    def poll(self, block: bool) -> list[tuple[bytes, ToEngine]]: ...

    def send(self, client: bytes, message: ToClient) -> object: ...


@dataclass(slots=True)
class InFlight:
    """A launched step whose ids are not on the host yet."""

    plan: Plan
    ticket: Ticket
    launched: float  # seconds of the engine's clock
    load: StepLoad | None  # None: nobody predicts step times
    waited: float = 0.0  # seconds from the results that it waited for to its launch
    masked: np.ndarray | None = None  # queries that wait for masks of grammars


class Engine:
    """Owns the loop. `use_idle_time` does a piece of other work -> whether there was any.

    `beat` is called with the seconds that the loop expects to take until it is called again, or None where it cannot say.
    `book`: of the keys' accounts, where several engines share one.
    """

    def __init__(
        self,
        step: CompiledStep,
        scheduler: Scheduler,
        mailbox: Mailbox,
        limits: Limits,
        info: Callable[[], EngineInfo],
        clock: Callable[[], float],
        stats: EngineStats,
        seed: int = 0,
        use_idle_time: Callable[[], bool] = lambda: False,
        drafter: Drafter | None = None,
        grammars: Grammars | None = None,
        beat: Callable[[float | None], None] = lambda _: None,
        book: Book | None = None,
    ) -> None:
        self.step = step
        self.scheduler = scheduler
        self.mailbox = mailbox
        self.limits = limits
        self.info = info
        self.clock = clock
        self.stats = stats
        self.use_idle_time = use_idle_time
        self.drafter = drafter
        self.grammars = grammars
        self.beat = beat
        self.stopping = False
        self._packer = Packer(scheduler.batch)
        self._running: InFlight | None = None
        self._throughput = Throughput()
        self._admission = Admission(
            scheduler,
            limits,
            lambda *told: mailbox.send(*told),
            clock,
            seed,
            grammars,
            self._throughput,
            stats.metrics.observe_refused,
            book,
        )
        self._isolation = FaultIsolation(scheduler)
        self._cache_watch = CacheWatch(scheduler, lambda *told: mailbox.send(*told))
        self._last_done = 0.0
        self._moved = 0.0  # when a step ended, well or not, or the engine was idle last

    def run(self) -> None:
        """Turn until `stopping` is set."""
        while not self.stopping:
            self.turn(block=True)

    def turn(self, block: bool = False) -> None:
        """One turn of the loop: accept, schedule, launch, and commit the step before."""
        idle, now = self.idle, self.clock()
        if idle:
            self._moved = now
        self.stats.status_line.look(now, idle)
        used = block and idle and self._use_idle_time()
        self.beat(self._expected_s())
        for client, message in self.mailbox.poll(block and idle and not used):
            try:
                self._accept(client, message)
            except Exception:
                log.exception("a message of a web process could not be answered")
                if isinstance(message, Abort):  # nobody knows how far it got
                    self._running = None
                    self.scheduler.restart()
        self._admission.admit_compiled(wait=self._running is None and not self.scheduler.has_work)
        try:
            self._advance()
        except Exception as error:
            self._recover(error)
        for owner, timeline in self.stats.take_traced():
            self.mailbox.send(self._admission.clients[owner], timeline)
        now = self.clock()
        self._cache_watch.look(now)
        self._admission.accounts.look(now)

    def _use_idle_time(self) -> bool:
        self.beat(None)  # it may capture, or load what takes long
        return self.use_idle_time()

    def _expected_s(self) -> float | None:
        """Until the next turn: the step in flight is waited for in this one."""
        if self._running is None:
            return 0.0
        limit, load = self.scheduler.chunk_limit, self._running.load
        ms = None if limit is None or load is None else limit.step_time.expected_ms(load)
        return None if ms is None else ms / 1e3

    def _advance(self) -> None:
        """Schedule and launch a step, and commit the one before."""
        running, draft_tokens, done = self._running, None, None
        if running is not None and (self._isolation or self._wants_results(running.plan)):
            self._commit(running)
            running, done = None, self._last_done
        if running is None:
            self._isolation.choose()
        if self.drafter is not None:
            draft_tokens = self.drafter.propose(ahead=running is not None)
        plan = self.scheduler.schedule(draft_tokens)
        self._running = self._launch(plan, done) if plan else None
        if running is not None:
            self._commit(running)
        if self._running is not None and self._running.masked is not None:
            self._mask(self._running)

    def _wants_results(self, running: Plan) -> bool:
        return self.drafter is not None and self.drafter.wants_results(running)

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight."""
        return self._running is None and not self.scheduler.has_work and not self.grammars

    @property
    def stalled_s(self) -> float:
        """Seconds since anything moved, in the loop or at a grammar; 0 where nothing has to."""
        moved = 0.0 if self.idle else self.clock() - self._moved
        return moved if self.grammars is None else max(moved, self.grammars.stalled_s)

    def _launch(self, plan: Plan, done: float | None) -> InFlight:
        """`done`: when the results came that this step waited for, if it did."""
        now = self.clock()
        self.stats.launched(plan, now)
        step = self._packer.pack(plan)
        waited = 0.0 if done is None else now - done
        load = None if self.scheduler.chunk_limit is None else StepLoad.of(plan)
        return InFlight(plan, self.step.launch(step), now, load, waited, step.sampling.masked)

    def _mask(self, launched: InFlight) -> None:
        """Let a step sample what grammars allow: the tokens before it are known now."""
        assert self.grammars is not None and launched.masked is not None and launched.ticket.masks is not None
        refused = self.grammars.masks.fill(launched.plan, launched.masked, launched.ticket.masks)
        launched.ticket.sample()
        self._refuse_all(refused)

    def _commit(self, done: InFlight) -> None:
        output = done.ticket.wait()
        self._moved = now = self.clock()
        seconds = now - max(done.launched, self._last_done)
        self._last_done = now
        if self.scheduler.chunk_limit is not None and done.load is not None:
            self.scheduler.chunk_limit.step_time.observe(done.load, seconds * 1e3)
        result = self.scheduler.commit(done.plan, output)
        refused = [] if self.grammars is None else self.grammars.masks.advance(result)
        self._deliver(result)  # before anything else may raise: committed tokens have been sent
        self.scheduler.finish(result)
        self._refuse_all(refused)
        self._isolation.stepped(len(result.slots))
        self._throughput.stepped(seconds, sum(one.num_prompt for one in result.begun), len(result.ended))
        if self.drafter is not None:
            self.drafter.learn(done.plan, result, output.ngram, seconds * 1e3, done.waited * 1e3)
        self.stats.stepped(result, now)

    def _deliver(self, result: StepResult) -> None:
        """One message for each web process with sequences in the step; before them what came of prompts, each alone."""
        for owner, delta in result.prompts:
            self._tell(owner, Tokens([delta]))
        one = result.owners[:1]
        owners = set((one if (result.owners == one).all() else result.owners).tolist())
        plain = None
        if len(owners) > 1 or result.deltas:
            plain = np.ones(len(result.slots), bool)
            plain[list(result.deltas)] = False
        for owner in owners:
            deltas, theirs = list(result.deltas.values()), plain
            if len(owners) > 1:
                deltas = [delta for index, delta in result.deltas.items() if result.owners[index] == owner]
                theirs = plain & (result.owners == owner)
            ids, tokens = result.request_ids, result.token_ids
            if theirs is not None:
                ids, tokens = ids[theirs], tokens[theirs]
            self._tell(owner, Tokens(deltas, ids.tolist(), tokens.tolist()))

    def _tell(self, owner: int, tokens: Tokens) -> None:
        """Send tokens to a web process; if that raises, one by one, and a request whose tokens cannot be sent ends."""
        try:
            self.mailbox.send(self._admission.clients[owner], tokens)
        except Exception:
            deltas = list(tokens.each())
            if len(deltas) == 1:
                log.exception("tokens of a request could not be sent")
                self._fail((owner, deltas[0].request_id))
                return
            for delta in deltas:
                self._tell(owner, Tokens([delta]))

    def _recover(self, error: Exception) -> None:
        """Drop a step that raised, in scheduling or on the device, restart all sequences, and fail the one to blame if
        it is known.

        Raises RuntimeError if it is no request's fault, as RanksLost never is.
        """
        if isinstance(error, RanksLost):
            raise error
        log.error("a step failed", exc_info=error)
        self.beat(None)
        self._running = None
        self._moved = self.clock()
        touched = self.scheduler.restart()
        self._prove(error)
        guilty = self._isolation.accuse(touched)
        if guilty is None:
            log.warning("%d sequences run one at a time, to find whose step it is that fails", len(touched))
        else:
            self._fail(guilty.key)

    def _prove(self, error: Exception) -> None:
        """Run a sequence of the engine's own, which is not counted. Raises RuntimeError if its steps fail too."""
        for _ in range(MAX_FAILED_STEPS):
            counters = replace(self.scheduler.counters)
            own = Sequence("", np.zeros(1, np.int32), SamplingParams(max_tokens=1), frozenset(), 0, 2, owner=-1)
            try:
                self.scheduler.alone = own
                self.scheduler.add(own)
                plan = self.scheduler.schedule()
                assert plan is not None
                output = self.step.launch(self._packer.pack(plan)).wait()
                self.scheduler.finish(self.scheduler.commit(plan, output))
                self.scheduler.alone = None
                return
            except Exception as another:
                log.error("so does a step of one token that is nobody's", exc_info=another)
                own.finish_reason = "error"
                self.scheduler.restart()
            finally:
                self.scheduler.counters = counters
        raise RuntimeError(f"a step failed, and {MAX_FAILED_STEPS} of one token after it") from error

    def _fail(
        self,
        key: tuple[int, str],
        status: int = 500,
        reason: str = "a step of the model failed for this request; the log says why",
        field: str = "",
    ) -> None:
        """End a sequence because of an exception that is its own."""
        if sequence := self.scheduler.abort(key, "error"):
            self.stats.ended(sequence, self.clock())
            failed = Failed(sequence.request_id, status, reason, field=field)
            self.mailbox.send(self._admission.clients[sequence.owner], failed)

    def _refuse_all(self, refused: list[Refused]) -> None:
        """End sequences that their grammars do not let go on."""
        for sequence, status, reason in refused:
            self._fail(sequence.key, status, reason, "structured_outputs")

    def _accept(self, client: bytes, message: ToEngine) -> None:
        match message:
            case Submit():
                self._admission.receive(client, [message], tell_admitted=False)
            case SubmitGroup():
                self._admission.receive(client, message.each(), tell_admitted=True, taken=message.taken)
            case Abort(request_id, reason):
                if sequence := self._admission.abort(client, request_id, reason):
                    self.stats.ended(sequence, self.clock())
            case Hello():
                self.mailbox.send(client, self.info())
            case ListRecent(asker):
                self.mailbox.send(client, Recent(asker, self.stats.recent(asker)))
            case WatchCache():
                self._cache_watch.add(client, self.clock())
