"""A node other than the first: starts its ranks of the model, hands them what node 0 tells, and ends with them or with node 0.

`runtime serve` with a `node_rank` above 0 is this. It has no engine and serves nothing: what each of its ranks
(`runtime.engine.rank_process`) is told comes over its one connection to node 0, once for all of them. Imports no torch.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from typing import NoReturn

from pagegraph.runtime.config import Config
from pagegraph.runtime.engine import links
from pagegraph.runtime.server.child import child_environment, module_command
from pagegraph.runtime.server.listen import Unserved

log = logging.getLogger("pagegraph.node")

REACH_S = 300.0  # for node 0 to listen, and then to say what to compute
END_S = 5.0  # for a rank to end by itself


def start_rank(
    rank: int, settings: dict[str, object], place: str, all_graphs: bool, address: str | None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process of that rank, and this end of its socket; `rank_process` says what the others are."""
    ours, theirs = socket.socketpair()
    command = module_command("pagegraph.runtime.engine.rank_process", str(theirs.fileno()))
    with theirs:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=child_environment()
        )
    links.send(ours, settings, rank, place, all_graphs, address)
    return process, ours


def how_it_ended(rank: int, size: int, status: int, said: list[str] | None) -> str:
    """Of a rank's process: its status, and why, if it could say."""
    how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    return f"rank {rank} of {size} ended with {how}{'' if said is None else f': {said[-1]}'}"


class _Stopped(BaseException):
    """This process got the signal that it names."""


def _stop(number: int, _: object) -> NoReturn:
    for one in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # what follows ends in seconds, and another signal must not cut it short
        signal.signal(one, signal.SIG_IGN)
    raise _Stopped(signal.Signals(number).name)


def follow_node_0(config: Config) -> int:
    """Until node 0 ends, or SIGTERM or Ctrl-C comes -> 0; main thread only.

    Raises Unserved where node 0 is not there, refuses this node or goes away, and where a rank ends.
    """
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _follow(config)
    except _Stopped as stopped:
        log.info("node %d of %d ends: it got %s", config.node_rank, config.nnodes, stopped)
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(config: Config) -> int:
    where = f"master_addr={config.master_addr} master_port={config.master_port}"
    assert config.master_addr is not None
    log.info("waiting up to %g s for node 0 at %s", REACH_S, where)
    try:
        leader = links.reach(config.master_addr, config.master_port, REACH_S)
    except OSError as error:
        raise Unserved(
            f"{where}: node 0 does not answer there within {REACH_S:g} s ({error}); start it, or name an address of it that is"
            " reached from here"
        ) from error
    node = _Node(config, leader)
    try:
        return node.run(where)
    except _Stopped as stopped:
        node.tell_stopped(str(stopped))
        raise
    finally:
        node.end()


class _Node:
    def __init__(self, config: Config, leader: socket.socket) -> None:
        self._config = config
        self._leader = leader
        self._lock = threading.Lock()  # of what is said to node 0
        self._ranks: dict[int, tuple[subprocess.Popen[bytes], socket.socket]] = {}
        self._over = threading.Event()
        self._why: str | None = None  # what to raise, once it is over

    def run(self, where: str) -> int:
        config, size = self._config, self._config.tensor_parallel_size
        links.say(self._leader, "node", str(config.node_rank), str(config.nnodes), str(size))
        self._leader.settimeout(REACH_S)  # whoever listens there may be another service, that waits too
        first = links.receive(self._leader)
        self._leader.settimeout(None)
        if first is None or first[0] != "welcome":
            silent = (
                f"node 0 ended, or did not say within {REACH_S:g} s what to compute; is it node 0 that listens there?"
            )
            raise Unserved(f"{where}: {first[1] if first else silent}")
        _, settings, place, all_graphs = first
        if settings["model"] != config.model:
            log.warning("model=%s is node 0's, and counts; this node was given %s", settings["model"], config.model)
        each = size // config.nnodes
        for rank in range(config.node_rank * each, (config.node_rank + 1) * each):
            host = self._leader.getsockname()[0]
            self._ranks[rank] = start_rank(rank, settings, place, all_graphs, host)
        log.info("node %d of %d: ranks %s of %d", config.node_rank, config.nnodes, list(self._ranks), size)
        threading.Thread(target=self._hand_on, daemon=True).start()
        waiting = [threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in self._ranks]
        for one in waiting:
            one.start()
        self._over.wait()
        if self._why is not None:
            raise Unserved(self._why)
        log.info("node 0 has ended, and so does node %d of %d", config.node_rank, config.nnodes)
        return 0

    def tell_stopped(self, name: str) -> None:
        """Node 0, that this node got that signal: what ends from now on is no fault of a rank."""
        self._over.set()
        self._say("failed", f"it got {name}")

    def end(self) -> None:
        """End the ranks, then the connection."""
        for _, ours in self._ranks.values():
            with suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
        for process, _ in self._ranks.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._leader.close()

    def _hand_on(self) -> None:
        """What node 0 tells, to all ranks, until it closes or says by an empty frame that it is the end."""
        while content := links.frame(self._leader):
            for _, ours in self._ranks.values():
                with suppress(OSError):  # of a rank that has ended, who watches it tells
                    links.put(ours, content)
        self._end_for(None if content == b"" else "node 0 has ended, or does not answer")

    def _watch(self, rank: int) -> None:
        process, ours = self._ranks[rank]
        said = None
        while (words := links.heard(ours)) is not None:
            if words[0] == "here":
                self._say("here", str(rank))
            else:
                said = words
        why = how_it_ended(rank, self._config.tensor_parallel_size, process.wait(), said)
        if not self._over.is_set():
            self._say("failed", why)
            self._end_for(why)

    def _say(self, *words: str) -> None:
        with self._lock, suppress(OSError):
            links.say(self._leader, *words)

    def _end_for(self, why: str | None) -> None:
        with self._lock:
            if not self._over.is_set():
                self._why = why
                self._over.set()
