"""The other processes that share a model: started here, told of each step, and never waited for in vain.

This process is rank 0, which runs the engine. The others (`runtime.engine.rank_process`) build their share of the same model
and launch what is launched here: each gets the step's input, the numpy arrays of `StepInput`, over a socket that it inherits; of several machines each
(`runtime.engine.node_process`) gets it once, over one connection. So it is
with CUDA graphs: which are captured, and when, is said here, because sums are in them. They meet
in a file of a private folder, or at an address of this machine, and sum over sockets, or by NCCL. One that ends says why over its socket, if it can; over
gloo this process's sum raises then, on a GPU the wait for a step does. One that hangs is given the time of the watchdog. Either way
the ranks are no longer at the same
place: the engine ends, and whoever started it may start it anew. Knows processes and messages; knows no model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.inputs import Pending, StepInput, StepOutput
from pagegraph.compiler.step.step import RanksLost
from pagegraph.kernels.collective import groups
from pagegraph.runtime.config import Config, ConfigError
from pagegraph.runtime.engine import links
from pagegraph.runtime.engine.compiler_options import GROUP, compiler_options
from pagegraph.runtime.engine.node_process import END_S, how_it_ended, start_rank
from pagegraph.runtime.server.start_errors import sentence

log = logging.getLogger("pagegraph.engine")

BUILD_S = 3600.0  # that a rank may be behind the others while models load and compile
START_S = 300.0  # for a rank's process to import what it needs
MEET_S = 60.0  # for ranks that have said that they are there
HELLO_S = 10.0  # for who connects to say which node it is
TOLD_S = 2.0  # from a sum that failed until it is known that a rank has ended
BETTER_S = 5.0  # from a rank's end while models are built until the first has met the same fault, and says it better
LOOK_S = 0.2  # between looks at the others while a step is waited for


def store_at(place: str, size: int) -> Store:
    """Where so many ranks meet: the path of a file, or host:port of rank 0 on another machine. Raises RuntimeError."""
    if os.path.isabs(place):
        return FileStore(place, size)
    host, _, port = place.rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=MEET_S))


def meet(store: Store, rank: int, size: int, device: torch.device, address: str | None) -> groups.Group:
    """Meet the other ranks at `store` -> the group that ops run over from now on, with the time that building takes.

    A GPU becomes this thread's current one. address: as `groups.connect` has it. Raises RuntimeError where they are not there in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = groups.connect(store, rank, size, device, MEET_S, address)
    group.timeout_s = BUILD_S
    groups.register(GROUP, group)
    return group


def _waits(of: socket.socket, seconds: float | None) -> bool:
    """Whether there is something to read, or its end, within so many seconds (None: as long as it takes), whatever the socket's own."""
    try:
        return bool(select.select([of], [], [], seconds)[0])
    except (OSError, ValueError):  # it was closed here
        return False


class _Rank:
    """A rank on this machine: its process, and this end of its socket."""

    def __init__(self, rank: int, size: int, process: subprocess.Popen[bytes], ours: socket.socket) -> None:
        self.name = f"rank {rank}"
        self.socket = ours
        self.process = process
        self._rank, self._size = rank, size

    def is_there(self) -> bool:
        """Whether it says so."""
        return links.heard(self.socket) is not None

    def ends(self) -> str:
        """Wait for it -> how it has ended."""
        status = self.process.wait()
        said = links.heard(self.socket) if _waits(self.socket, LOOK_S) else None
        return how_it_ended(self._rank, self._size, status, said)

    def let_go(self) -> None:
        """Have it end by itself."""
        self.socket.close()

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> None:
        """Until it has ended, by itself or not."""
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Node:
    """The ranks on another machine: the connection to `node_process` there, which says what becomes of them."""

    def __init__(self, node: int, nodes: int, num_ranks: int, connection: socket.socket) -> None:
        self.name = f"node {node} of {nodes}"
        self.socket = connection
        self._num_ranks = num_ranks
        self._failed: str | None = None

    def is_there(self) -> bool:
        """Whether all of its ranks say so."""
        for _ in range(self._num_ranks):
            words = links.heard(self.socket)
            if words is None or words[0] != "here":
                self._failed = words[-1] if words else None
                return False
        return True

    def ends(self) -> str:
        """Wait for it -> how it has ended."""
        words = links.heard(self.socket) if _waits(self.socket, None) else None
        if words is not None:
            self._failed = words[-1]
        return f"{self.name} has ended, or does not answer" if self._failed is None else f"{self.name}: {self._failed}"

    def let_go(self) -> None:
        """Have it end: that is no failure."""
        with suppress(OSError):
            links.put(self.socket, b"")
        self.socket.close()

    def kill(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Nothing here holds up what it does."""


class Followers:
    """The other ranks' processes, and the nodes that have some."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        on_end: Callable[[str], None] = lambda why: None,
        *,
        all_graphs: bool = True,
    ) -> None:
        """Start them, and wait for the other nodes; returns when all are there.

        device: of this rank. all_graphs: what it gives to `BuiltModel.capture_graphs`. on_end: called, on a thread of its own, with the reason when one ends before `stop`: what this process does
        on a GPU may wait for it in vain. Raises RanksLost where one does not come.
        """
        self._size = config.tensor_parallel_size
        self._folder = Path(tempfile.mkdtemp(prefix="pagegraph-ranks-"))
        self._told: list[str] = []  # why ranks have ended
        self._ended = threading.Event()
        self._lost: RanksLost | None = None
        self._stopping = False
        self._on_end = on_end
        self._built = False
        self._group: groups.Group | None = None
        self._others: list[_Rank | _Node] = []
        settings = dataclasses.asdict(dataclasses.replace(config, api_key=None))
        try:
            with contextlib.ExitStack() as closing:
                listener: socket.socket | None = None
                address: str | None = None
                place = str(self._folder / "store")
                if config.nodes_meet_at is not None:
                    listener = closing.enter_context(self._listen(*config.nodes_meet_at))
                    address = str(listener.getsockname()[0])
                    store, place = _store_on(address)
                else:
                    store = FileStore(place, self._size)
                for rank in range(1, self._size // config.nnodes):
                    process, ours = start_rank(rank, settings, place, all_graphs, address)
                    ours.settimeout(START_S)
                    self._others.append(_Rank(rank, self._size, process, ours))
                if listener is not None:
                    self._others += self._nodes(config, listener, settings, place, all_graphs)
            for which, one in enumerate(self._others):
                here = one.is_there()
                threading.Thread(target=self._watch, args=(which,), name=one.name, daemon=True).start()
                if not here:
                    raise self.lost(RuntimeError(f"{one.name} did not start"))
            self._group = meet(store, 0, self._size, device, address)
        except BaseException:
            self.stop()
            raise

    def _listen(self, host: str, port: int) -> socket.socket:
        try:
            return links.listen(host, port)
        except OSError as error:
            raise RanksLost(
                f"master_addr={host} master_port={port}: {error.strerror or error}; name an address of this machine, and a free port"
            ) from error

    def _nodes(
        self, config: Config, listener: socket.socket, settings: dict[str, Any], place: str, all_graphs: bool
    ) -> list[_Node]:
        """The other nodes, in their order. Raises RanksLost where one does not come in time."""
        wanted = ["node", str(config.nnodes), str(self._size)]
        found: dict[int, _Node] = {}
        deadline = time.monotonic() + START_S
        where = f"master_addr={config.master_addr} master_port={config.master_port}"
        log.info(
            "waiting up to %g s for nodes %s of %d at %s", START_S, [*range(1, config.nnodes)], config.nnodes, where
        )
        while len(found) < config.nnodes - 1:
            listener.settimeout(max(deadline - time.monotonic(), LOOK_S))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [node for node in range(1, config.nnodes) if node not in found]
                raise RanksLost(
                    f"nodes {missing} of {config.nnodes} did not come to {where} within {START_S:g} s; there, run `runtime serve` with"
                    " the same configuration and their node_rank"
                ) from None
            links.watch(connection)
            connection.settimeout(HELLO_S)
            words = links.heard(connection) or []
            node = int(words[1]) if len(words) == 4 and words[1].isdecimal() else 0
            if [*words[:1], *words[2:]] != wanted or node in found or not 0 < node < config.nnodes:
                with suppress(OSError):
                    links.send(connection, "refused", refusal(config.nnodes, self._size, words))
                connection.close()
                continue
            connection.settimeout(START_S)
            links.send(connection, "welcome", settings, place, all_graphs)
            found[node] = _Node(node, config.nnodes, self._size // config.nnodes, connection)
        return [found[node] for node in sorted(found)]

    @property
    def pids(self) -> list[int]:
        """Of the processes on this machine, by rank from 1 on."""
        return [one.process.pid for one in self._others if isinstance(one, _Rank)]

    def follow(self, built: BuiltModel, timeout_s: float) -> None:
        """From now on the others launch what `built` launches; a rank may be so many seconds behind.

        Raises RanksLost where one has ended already.
        """
        assert self._group is not None
        self._built = True
        if self._ended.is_set():
            raise self.lost(RuntimeError("it has ended"))
        self._group.timeout_s = timeout_s
        for one in self._others:
            one.socket.settimeout(timeout_s)  # a rank that hangs does not read what it is sent
        shutil.rmtree(self._folder, ignore_errors=True)  # they have met
        for which, step in enumerate(built.steps):
            step.lead = _Leading(self, which)
        built.closing = self.stop

    def tell(self, *message: Any) -> None:
        """Send to all: to each rank here, and once to each other node. Raises RanksLost."""
        if self._lost is not None:
            raise self._lost
        if self._ended.is_set():
            raise self.lost(RuntimeError("it has ended"))
        try:
            for one in self._others:
                links.send(one.socket, *message)
        except OSError as error:
            raise self.lost(error) from error

    def wait(self, pending: Pending) -> StepOutput:
        """The output of a step, or what it raised; RanksLost where a rank has ended, or, where sums raise nothing, a step takes
        longer than ranks may be behind."""
        assert self._group is not None
        end = math.inf if self._group.raises else time.monotonic() + self._group.timeout_s
        while not pending.done():
            try:
                return pending.result(LOOK_S)
            except TimeoutError as error:
                if pending.done():
                    continue
                if self._ended.is_set() or time.monotonic() > end:
                    raise self.lost(RuntimeError(f"a step has not ended in {self._group.timeout_s:g} s")) from error
        return pending.result()

    def lost(self, error: Exception) -> RanksLost:
        """What to raise for an error that one rank alone has met; one that has ended says how, the others are ended."""
        if isinstance(error, RanksLost):
            return error
        if self._lost is None:
            if isinstance(error, torch.OutOfMemoryError):
                self._told.append(f"rank 0 of {self._size}: {sentence(error)}")
            else:
                self._ended.wait(TOLD_S)
            why = "; ".join(self._told) or f"a rank failed or did not answer in time ({error})"
            self._lost = RanksLost(
                f"{why}; tensor_parallel_size={self._size} needs all of its ranks, so nothing more is computed"
            )
            self._stopping = True
            for one in self._others:
                one.kill()
            if (
                self._group is not None
            ):  # beside this thread: NCCL lets kernels go, then waits for graphs that hold its calls
                threading.Thread(target=self._group.abort, name="abort", daemon=True).start()
        return self._lost

    def stop(self) -> None:
        """End them; may be called again."""
        self._stopping = True
        groups.forget(GROUP)
        for one in self._others:
            one.let_go()
        for one in self._others:
            one.wait()
        if self._group is not None and self._lost is None:
            self._group.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self, which: int) -> None:
        how = self._others[which].ends()
        if self._stopping:
            return
        self._told.append(how)
        self._ended.set()
        if not self._built:
            time.sleep(BETTER_S)
            if self._stopping:
                return
        self._on_end(self._told[-1])
        if self._group is not None and not self._built:
            self._group.abort()  # lets this rank's call return, whose next one raises


def refusal(nnodes: int, size: int, words: list[str]) -> str:
    """What a node is told that does not go with this one, or has come already. words: by which it said what it is."""
    if len(words) == 4 and words[0] == "node":
        said = f"has node_rank={words[1]}, nnodes={words[2]} and tensor_parallel_size={words[3]}"
    else:
        said = f"said {' '.join(words)}"
    return (
        f"node 0 has nnodes={nnodes} and tensor_parallel_size={size}, and waits for each node_rank from 1 to {nnodes - 1} once; this"
        f" one {said[:200]}"
    )


def _store_on(address: str) -> tuple[Store, str]:
    """A store that other machines reach at this address alone, and host:port of it."""
    listener = links.listen(address, 0)
    port = listener.getsockname()[1]
    store = TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=False
    )
    return store, f"{address}:{port}"


class _Leading:
    """`compiler.step.step.Lead` of one of the model's steps."""

    def __init__(self, followers: Followers, which: int) -> None:
        self._followers = followers
        self._which = which
        self.lost = followers.lost

        self.wait = followers.wait

    def launch(self, step: StepInput, num_steps: int) -> None:
        self._followers.tell("launch", self._which, step, num_steps)

    def capture(self, bucket: Bucket) -> None:
        self._followers.tell("capture", self._which, bucket)

    def sample(self, masks: np.ndarray) -> None:
        self._followers.tell("sample", np.ascontiguousarray(masks))


def build_with_ranks(config: Config, build: Callable[[CompilerOptions], BuiltModel]) -> BuiltModel:
    """What `build` makes of the configuration, with the other ranks behind it if it has any; `BuiltModel.close` ends them.

    Raises what `build` raises, RanksLost, and ConfigError on a node other than the first.
    """
    if config.node_rank:
        raise ConfigError(
            f"node_rank={config.node_rank}: node 0 has the engine; here, run `runtime serve` with the same configuration and this"
            " node_rank"
        )
    options = compiler_options(config)
    if config.tensor_parallel_size == 1:
        return build(options)
    followers = Followers(config, options.device)
    try:
        built = build(options)
        followers.follow(built, config.watchdog_timeout_s)
        return built
    except RuntimeError as error:
        lost = followers.lost(error)
        followers.stop()
        raise lost from error
    except BaseException:
        followers.stop()
        raise
