"""All engines of a server as a web process sees them: as one that takes requests, of which it chooses an engine for each.

An engine that goes away loses its requests without a token to the others; where there is none, they wait for it to come
back. One whose queue is full hands a request on. With one engine there is nothing to choose and nothing is asked of it.
Knows no HTTP and no processes. For many threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from pagegraph.runtime.askers import NOBODY, Asker
from pagegraph.runtime.ipc.client import EngineClient, Group
from pagegraph.runtime.ipc.connection import Comeback, EngineDead, OpenGroup
from pagegraph.runtime.ipc.protocol import SILENCE_S, CacheChanged, EngineInfo, Timeline
from pagegraph.runtime.ipc.routing import Engine, Placed, Route, choose
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.scheduler.block_hashes import BlockHashes

_LOOK_S = 0.01  # between looks at new connections, until one has been answered
_QUIET_S = 10.0  # that an engine may not be heard before others are preferred


@dataclass(frozen=True)
class Address:
    """Where an engine listens, and what is known of its coming back; see `EngineClient`."""

    address: str
    comeback: Comeback = lambda: None
    is_started: Callable[[], bool] = lambda: False


class Replicas:
    """`block_hash_key`: of the engines' block hashes; None where they have no prefix cache."""

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        silence_s: float = SILENCE_S,
        block_hash_key: bytes | None = None,
        on_timeline: Callable[[Timeline], None] = lambda _: None,
    ) -> None:
        self._lock = threading.Lock()  # of what is known of the engines
        self._engines = [Engine() for _ in addresses]
        self._key = block_hash_key
        self.clients: list[EngineClient] = []
        self.clients += [
            EngineClient(
                one.address,
                silence_s=silence_s,
                comeback=partial(self._comeback, one.comeback),
                is_started=one.is_started,
                on_timeline=on_timeline,
                front=_Front(self, number) if len(addresses) > 1 else None,
            )
            for number, one in enumerate(addresses)
        ]

    def info(self, timeout: float | None = None) -> EngineInfo:
        """The facts of all engines that are there as if they were one: what runs and waits is summed.

        Waits up to `timeout` seconds for one of them; by default for first answers of new connections alone, as
        `EngineClient.info` does. Raises EngineDead.
        """
        if len(self.clients) == 1:
            return self.clients[0].info(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            dead, infos = [], []
            for client in self.clients:
                try:
                    infos.append(client.info(0.0))
                except EngineDead as error:
                    dead.append(error)
            if infos:
                return together(infos)
            waits = any(client.connection.is_waited_for for client in self.clients)
            if not waits if deadline is None else time.monotonic() >= deadline:
                raise min(dead, key=lambda error: (error.retry_after_s is None, error.retry_after_s or 0.0))
            time.sleep(_LOOK_S)

    def submit_group(
        self,
        sequences: Sequence[tuple[list[int], SamplingParams]],
        priority: int = 0,
        cache_salt: str = "",
        asker: Asker = NOBODY,
        label: str = "",
        trace: str = "",
    ) -> Group:
        """As `EngineClient.submit_group`, with the engine that can begin with the least left to do."""
        if len(self.clients) == 1:
            return self.clients[0].submit_group(sequences, priority, cache_salt, asker, label, trace)
        info = self.info()
        prompts = list({id(token_ids): token_ids for token_ids, _ in sequences}.values())
        if self._key is None:
            route = Route(len(sequences), sum(map(len, prompts)), info.block_size)
        else:
            route = Route.of(prompts, len(sequences), cache_salt, BlockHashes(info.block_size, self._key))
        reserved = _Reserved(route)  # so that who chooses meanwhile knows of it
        number = self._choose(reserved)
        if number is None:
            raise EngineDead("the engine does not answer", 1.0)  # the last one went away this moment
        client, engine = self.clients[number], self._engines[number]
        try:
            group = client.submit_group(sequences, priority, cache_salt, asker, label, trace, route)
            with self._lock:
                if group.opened.home is client.connection:
                    engine.place(group.opened)
            return group
        finally:
            with self._lock:
                engine.part_with(reserved)

    def recent(self, asker: str, timeout: float) -> list[Timeline]:
        """What became of the last sequences of one asker, the newest last. Raises EngineDead where no engine tells."""
        told, dead = [], []
        for client in self.clients:
            try:
                told.append(client.recent(asker, timeout))
            except EngineDead as error:
                dead.append(error)
        if not told:
            raise dead[0]
        return sorted((one for timelines in told for one in timelines), key=lambda one: one.ended)

    def close(self) -> None:
        """Stop the background threads; open streams end with EngineDead."""
        for client in self.clients:
            client.close()

    def _choose(self, one: Placed, but: Iterable[int] = ()) -> int | None:
        """The number of an engine that is there and is given this request now; None: none is, but for those."""
        up = [
            number for number, client in enumerate(self.clients) if number not in but and client.is_up
        ]  # fmt: skip
        heard = [number for number in up if self.clients[number].silent_s < _QUIET_S]
        if not up:
            return None
        with self._lock:
            for engine in self._engines:
                engine.forget_ended()
            number = choose(self._engines, one.route, heard or up)
            self._engines[number].place(one)
        return number

    def _comeback(self, own: Comeback) -> float | None:
        """What who was lost with one engine is told: whoever asks again finds another, if one is there."""
        seconds = own()
        there = seconds is not None and len(self.clients) > 1 and any(client.is_up for client in self.clients)
        return min(seconds, 1.0) if there and seconds is not None else seconds

    def _learn(self, number: int, told: CacheChanged) -> None:
        with self._lock:
            self._engines[number].learn(told)

    def _move(self, number: int, group: OpenGroup, is_full: bool) -> bool:
        """Whether a group of this engine is another's now, or has ended."""
        if is_full:
            group.full.add(number)
        with self._lock:
            self._engines[number].part_with(group)
        another = self._choose(group, {number, *group.full})
        if another is None:
            return False
        target = self.clients[another].connection
        with group.moving:
            left = group.home.release(group)
            if left:
                group.home = target
                target.adopt(group, left)
        return True


@dataclass(slots=True, eq=False)
class _Reserved:
    """`Placed`, of a request that is about to be submitted."""

    route: Route
    admitted: bool = False
    begun: bool = False
    num_open: int = 1


class _Front:
    """`Front` of one engine's connection."""

    def __init__(self, replicas: Replicas, number: int) -> None:
        self._replicas = replicas
        self._number = number

    def learn(self, told: CacheChanged) -> None:
        self._replicas._learn(self._number, told)

    def move(self, group: OpenGroup, is_full: bool = False) -> bool:
        return self._replicas._move(self._number, group, is_full)


def together(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Facts of several engines of one configuration as if they were one."""
    first = next((one for one in infos if one.compile_state != "compiled"), infos[0])
    return msgspec.structs.replace(
        first,
        max_model_len=min(one.max_model_len for one in infos),
        draining=any(one.draining for one in infos),
        num_running=sum(one.num_running for one in infos),
        num_waiting=sum(one.num_waiting for one in infos),
    )
