"""Sends the work of a bench to a server: each request at its time, at most so many at once, from one process or several.

Says of itself how busy it was, for a client that is slower than the server measures itself. Knows the bodies of the
OpenAI protocol; knows no figures and no printing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import queue as queues
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

import msgspec

from pagegraph.runtime.bench.outcome import Outcome
from pagegraph.runtime.bench.stream import Target, send
from pagegraph.runtime.bench.work import Prompt, Request

Tick = Callable[[], object]  # called as each request ends


@dataclass(frozen=True)
class Plan:
    """Requests, when each arrives, and how they are sent."""

    target: Target
    model: str
    requests: Sequence[Request]
    times: Sequence[float]
    max_concurrency: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # of every body: temperature, ignore_eos
    timeout: float = 3600.0  # seconds of one request


@dataclass(frozen=True)
class Sent:
    """What became of all requests, in their order, in `duration` seconds."""

    outcomes: list[Outcome]
    duration: float
    busy: float  # share of a processor that the busiest process of this client used


def run(plan: Plan, processes: int = 1, tick: Tick = lambda: None) -> Sent:
    """Send everything and wait for the last answer."""
    processes = min(processes, plan.max_concurrency or processes, len(plan.requests))
    if processes <= 1:
        return asyncio.run(_Share(plan, 0, 1).drive(lambda: None, tick))
    return _run_in_processes(plan, processes, tick)


class _Share:
    """Every so manieth conversation, sent by one process."""

    def __init__(self, plan: Plan, place: int, processes: int) -> None:
        self._plan = plan
        self._mine = [index for index, first in enumerate(_firsts(plan.requests)) if first % processes == place]
        most = plan.max_concurrency
        self._slots = None if most is None else asyncio.Semaphore(len(range(place, most, processes)))
        self._tls = plan.target.tls()
        self._bodies: dict[int, bytes] = {}  # prepared, by request
        self._prompts: dict[int, Any] = {}  # of conversations: what was asked, by request
        self._answers: dict[int, asyncio.Future[Outcome]] = {}
        self._followed = {request.follows for request in plan.requests}

    async def drive(self, wait_for_others: Callable[[], object], tick: Tick) -> Sent:
        """Send at the times of the plan, counted from when this process and others are ready."""
        loop = asyncio.get_running_loop()
        self._answers = {index: loop.create_future() for index in self._mine}
        self._prepare()
        gc.collect()
        gc.freeze()  # what is made until here is not looked through while times are taken
        wait_for_others()
        begin, cpu = time.perf_counter(), time.process_time()
        tasks: list[asyncio.Task[None]] = []
        for index in self._mine:
            if (wait := begin + self._plan.times[index] - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self._request(index, tick)))
        await asyncio.gather(*tasks)
        duration = time.perf_counter() - begin
        gc.unfreeze()
        found = [self._answers[index].result() for index in self._mine]
        return Sent(found, duration, (time.process_time() - cpu) / duration)

    def _prepare(self) -> None:
        """The bodies that follow no answer, so that making them takes no time from streams."""
        for index in self._mine:
            request = self._plan.requests[index]
            if request.follows is None:
                prompt = _first(request.prompt, self._plan.target.is_chat)
                self._bodies[index] = self._body(request, prompt)
                self._keep(index, prompt)

    def _keep(self, index: int, prompt: Any) -> None:
        if index in self._followed:
            self._prompts[index] = prompt

    async def _request(self, index: int, tick: Tick) -> None:
        request = self._plan.requests[index]
        before = None if request.follows is None else await self._answers[request.follows]
        if before is not None and before.error:
            outcome = Outcome(error=f"the turn before it failed: {before.error}")
        else:
            outcome = await self._send(index, request, before)
        self._answers[index].set_result(outcome)
        tick()

    async def _send(self, index: int, request: Request, before: Outcome | None) -> Outcome:
        if before is None:
            body = self._bodies.pop(index)
        else:
            assert request.follows is not None
            prompt = _continued(self._prompts.pop(request.follows), before.text, request.prompt)
            self._keep(index, prompt)
            body = self._body(request, prompt)
        arrived = time.perf_counter()
        async with self._slots or contextlib.nullcontext():
            outcome = await send(self._plan.target, self._tls, body, self._plan.timeout)
        outcome.queue_time = max(0.0, outcome.start_time - arrived)
        if not outcome.has_usage:
            outcome.prompt_len = request.input_len
        return outcome

    def _body(self, request: Request, prompt: Any) -> bytes:
        chat = self._plan.target.is_chat
        body = {
            "model": self._plan.model,
            "messages" if chat else "prompt": prompt,
            "max_tokens": request.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(body | self._plan.fields)


def _first(prompt: Prompt, chat: bool) -> Any:
    """A request's `prompt` or `messages`."""
    if not chat:
        return prompt
    if not isinstance(prompt, str):
        raise TypeError("a chat takes text, no token ids")
    return [{"role": "user", "content": prompt}]


def _continued(asked: Any, answer: str, prompt: Prompt) -> Any:
    """What was asked, its answer, and the next prompt, as `prompt` or `messages`. All of it is text."""
    if not isinstance(prompt, str):
        raise TypeError("a conversation with a server is text, no token ids")
    if isinstance(asked, list):
        return [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": prompt}]
    return asked + answer + prompt


def _firsts(requests: Sequence[Request]) -> list[int]:
    """The number of the request that began each request's conversation."""
    firsts: list[int] = []
    for index, request in enumerate(requests):
        firsts.append(index if request.follows is None else firsts[request.follows])
    return firsts


def _run_in_processes(plan: Plan, processes: int, tick: Tick) -> Sent:
    context = multiprocessing.get_context("fork")  # the plan goes with it; nothing of this process runs threads yet
    results: Queue[Any] = context.Queue()
    ready = context.Barrier(processes)
    children = [
        context.Process(target=_child, args=(plan, place, processes, ready, results), daemon=True)
        for place in range(processes)
    ]
    for child in children:
        child.start()
    shares: dict[int, Sent] = {}
    while len(shares) < processes:
        try:
            place, found = results.get(timeout=1.0)
        except queues.Empty:
            if any(child.exitcode for child in children):
                raise RuntimeError("a process of the client ended early") from None
            continue
        if found is None:
            tick()
        elif isinstance(found, str):
            raise RuntimeError(f"a process of the client failed: {found}")
        else:
            shares[place] = found
    for child in children:
        child.join()
    return _together(plan, [shares[place] for place in range(processes)])


def _child(plan: Plan, place: int, processes: int, ready: Barrier, results: Queue[Any]) -> None:
    try:
        sent = asyncio.run(_Share(plan, place, processes).drive(ready.wait, lambda: results.put((place, None))))
        results.put((place, sent))
    except Exception as error:  # the parent waits for a word of each
        results.put((place, f"{type(error).__name__}: {error}"))


def _together(plan: Plan, shares: list[Sent]) -> Sent:
    places = [first % len(shares) for first in _firsts(plan.requests)]
    each = [iter(share.outcomes) for share in shares]
    outcomes = [next(each[place]) for place in places]
    return Sent(outcomes, max(share.duration for share in shares), max(share.busy for share in shares))
