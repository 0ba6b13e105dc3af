"""Submitted sequences on their way into the queue: their grammars are compiled, they are checked, all of a request or none.

Knows web processes by number and what the engine can take; knows no steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from pagegraph.runtime.askers import has_share
from pagegraph.runtime.engine.account_book import Book
from pagegraph.runtime.engine.accounts import Accounts
from pagegraph.runtime.engine.grammars import Grammars
from pagegraph.runtime.engine.limits import Limits
from pagegraph.runtime.engine.throughput import Throughput
from pagegraph.runtime.grammar.compiler import Grammar
from pagegraph.runtime.grammar.matcher import TokenMatcher
from pagegraph.runtime.ipc.protocol import Admitted, Failed, Quotas, Submit, ToClient
from pagegraph.runtime.sampling_params import check_ids, own_seed
from pagegraph.runtime.scheduler.scheduler import Scheduler
from pagegraph.runtime.scheduler.sequence import Samples, Sequence

log = logging.getLogger("pagegraph.engine")


class Clients:
    """Web processes by number, as `Sequence.owner` has it."""

    def __init__(self) -> None:
        self._clients: list[bytes] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, client: bytes) -> int:
        """Of a web process; it gets one when it is first heard of."""
        if client not in self._numbers:
            self._numbers[client] = len(self._clients)
            self._clients.append(client)
        return self._numbers[client]

    def __getitem__(self, number: int) -> bytes:
        return self._clients[number]


class Admission:
    """`send`: a message to a web process; `seed`: what sequences without one of their own get theirs from; `refused`: told why,
    of `runtime.engine.metrics.REFUSALS`, and how many sequences were not let in; `book`: of the keys' accounts.

    Of several keys each may always have one sequence waiting, and no more than its share of the queue.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        limits: Limits,
        send: Callable[[bytes, ToClient], object],
        clock: Callable[[], float],
        seed: int,
        grammars: Grammars | None,
        throughput: Throughput,
        refused: Callable[[str, int], object],
        book: Book | None = None,
    ) -> None:
        self.clients = Clients()
        self._scheduler = scheduler
        self._limits = limits
        self._send = send
        self._clock = clock
        self._seed = seed
        self._grammars = grammars
        self._throughput = throughput
        self._refused = refused
        self.accounts = Accounts(scheduler.num_generated, book)
        self._num_submitted = 0

    def receive(self, client: bytes, submits: list[Submit], tell_admitted: bool, taken: bool = False) -> None:
        """Queue sequences, or compile their grammars first. taken: however full the queue is."""
        if all(submit.params.structured_outputs is None for submit in submits):
            self._admit(client, submits, tell_admitted, taken)
        elif self._grammars is None:
            name = "structured_outputs"
            self._refuse(client, submits, 0, 400, f"{name} is not served by this engine; leave it out", name)
        elif taken or self._may_come(client, submits):
            self._grammars.compile(client, submits, tell_admitted, taken)

    def admit_compiled(self, wait: bool) -> None:
        """Queue those whose grammars are compiled by now. wait: there is nothing else to do, so wait a moment."""
        for group in self._grammars.take_done(wait) if self._grammars is not None else ():
            self._admit(group.client, group.submits, group.tell_admitted, group.taken, group.grammars)

    def abort(self, client: bytes, request_id: str, reason: str) -> Sequence | None:
        """End a sequence, wherever it is -> the sequence, if it was in the queue or ran."""
        if self._grammars is not None:
            self._grammars.abort(client, request_id)
        return self._scheduler.abort((self.clients.number(client), request_id), reason)

    def _admit(
        self,
        client: bytes,
        submits: list[Submit],
        tell_admitted: bool,
        taken: bool,
        grammars: list[Future[Grammar] | None] | None = None,
    ) -> None:
        if not taken and not self._may_come(client, submits):
            return
        added = self._submit(client, submits, grammars or [None] * len(submits))
        if not added:
            return
        quotas = self.accounts.charge(submits, added, self._clock())
        if tell_admitted:
            self._send(client, Admitted(submits[0].request_id, quotas))

    def _may_come(self, client: bytes, submits: list[Submit]) -> bool:
        """Whether their key's limits and the queue have room for them; if not, they are refused."""
        refusal = self.accounts.refusal(submits, self._clock())
        if refusal is not None:
            self._refused("key", len(submits))
            self._refuse(
                client, submits, 0, 429, refusal.message, retry_after_s=refusal.retry_after_s, quotas=refusal.quotas
            )
        return refusal is None and not self._queue_is_full(client, submits)

    def _queue_is_full(self, client: bytes, submits: list[Submit]) -> bool:
        """Whether they are refused for that. One that a limit has room for is let in whole, however large it is."""
        # Those that came with the same poll may start yet: only who finds no free slot waits.
        compiling, free = self._grammars or (), self._scheduler.batch.num_free
        num_waiting = self._scheduler.num_waiting + len(compiling)
        if num_waiting < free:
            return False
        limits, tokens = self._limits, self._scheduler.num_waiting_tokens
        asker = submits[0].asker.name
        own, own_tokens = self._scheduler.waiting_of(asker)
        if self._grammars is not None:
            tokens += self._grammars.num_tokens
            compiling_own, compiling_tokens = self._grammars.waiting_of(asker)
            own, own_tokens = own + compiling_own, own_tokens + compiling_tokens
        if asker and not own:
            return False
        if not has_share(asker, own, limits.max_queue - (num_waiting - free)):
            full = f"{num_waiting} sequences are waiting, max_queue is {limits.max_queue}"
        elif limits.max_queue_tokens is not None and not has_share(asker, own_tokens, limits.max_queue_tokens - tokens):
            full = f"{tokens} prompt tokens are waiting, max_queue_tokens is {limits.max_queue_tokens}"
        else:
            return False
        full += f"; {own} of the sequences are of this key" if asker else ""
        self._refused("queue", len(submits))
        wait_s = self._throughput.wait_s(tokens, num_waiting)
        self._refuse(client, submits, 0, 503, f"the queue is full: {full}", retry_after_s=wait_s)
        return True

    def _submit(self, client: bytes, submits: list[Submit], grammars: list[Future[Grammar] | None]) -> list[Sequence]:
        """Queue sequences, all of them or none; if none, one `Failed` says why. Returns those that are queued."""
        added: list[Sequence] = []
        # By the list that they came as: many may have the same.
        prompts: dict[int, np.ndarray] = {}
        samples: dict[int, Samples] = {}
        try:
            for submit, grammar in zip(submits, grammars, strict=True):
                self._limits.check(submit)
                if (key := id(submit.token_ids)) not in prompts:
                    check_ids("prompt", submit.token_ids, self._limits.vocab_size)
                    prompts[key], samples[key] = np.array(submit.token_ids, np.int32), Samples()
                sequence = self._sequence(client, submit, prompts[key])
                sequence.samples = samples[key]
                sequence.samples.count += 1
                sequence.grammar = None if grammar is None else TokenMatcher(grammar.result())
                self._scheduler.add(sequence)
                added.append(sequence)
            return added
        except ValueError as error:
            status, reason, field = 400, str(error), getattr(error, "field", "")
        except Exception:
            log.exception("a submitted sequence could not be added")
            status, reason, field = 500, "the request could not be added", ""
        bad = len(added)
        for sequence in added:
            self._scheduler.abort(sequence.key)
        self._refuse(client, submits, bad, status, reason, field)
        return []

    def _refuse(
        self,
        client: bytes,
        submits: list[Submit],
        which: int,
        status: int,
        reason: str,
        field: str = "",
        retry_after_s: float = 1.0,
        quotas: Quotas | None = None,
    ) -> None:
        """None of them runs, because of the one at `which`."""
        ids = [submit.request_id for submit in submits]
        self._send(client, Failed(ids.pop(which), status, reason, ids, field, retry_after_s, quotas))

    def _sequence(self, client: bytes, message: Submit, prompt: np.ndarray) -> Sequence:
        self._num_submitted += 1
        seed = message.params.seed
        return Sequence(
            request_id=message.request_id,
            tokens=prompt,
            params=message.params,
            eos_ids=self._limits.eos_ids,
            seed=seed if seed is not None else own_seed(self._seed, self._num_submitted),
            priority=message.priority,
            arrival=self._clock(),
            cache_salt=message.cache_salt,
            owner=self.clients.number(client),
            max_model_len=self._limits.max_model_len,
            pooler=self._limits.pooler,
            asker=message.asker.name,
            label=message.label,
            trace=message.trace,
        )
