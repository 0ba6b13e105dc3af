"""The other processes that share a model: started here, told of each step, and never waited for in vain.

This process is rank 0, which runs the engine. The others (`runtime.engine.rank_process`) build their share of the same model
and launch what is launched here: each gets the step's input, the numpy arrays of `StepInput`, over a socket that it inherits. So it is
with CUDA graphs: which are captured, and when, is said here, because sums are in them. They meet
in a file of a private folder and sum over the loopback interface, or by NCCL. One that ends says why over its socket, if it can; over
gloo this process's sum raises then, on a GPU the wait for a step does. One that hangs is given the time of the watchdog. Either way
the ranks are no longer at the same
place: the engine ends, and whoever started it may start it anew. Knows processes and messages; knows no model.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pickle
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._distributed_c10d import FileStore

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.options import CompilerOptions
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.inputs import Pending, StepInput, StepOutput
from pagegraph.compiler.step.step import RanksLost
from pagegraph.kernels.collective import groups
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import GROUP, compiler_options
from pagegraph.runtime.server.child import child_environment, module_command
from pagegraph.runtime.server.start_errors import sentence

log = logging.getLogger("pagegraph.engine")

BUILD_S = 3600.0  # that a rank may be behind the others while models load and compile
START_S = 300.0  # for a rank's process to import what it needs
MEET_S = 60.0  # for ranks that have said that they are there
END_S = 5.0  # for a rank to end by itself
TOLD_S = 2.0  # from a sum that failed until it is known that a rank has ended
BETTER_S = 5.0  # from a rank's end while models are built until the first has met the same fault, and says it better
LOOK_S = 0.2  # between looks at the others while a step is waited for


def send(to: socket.socket, *message: Any) -> None:
    """One message: its length in 8 bytes, then a pickle."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    to.sendall(len(content).to_bytes(8, "little") + content)


def receive(of: socket.socket) -> tuple[Any, ...] | None:
    """The next message; None where the other end has closed, or does not answer in the socket's time."""
    size = _exactly(of, 8)
    content = None if size is None else _exactly(of, int.from_bytes(size, "little"))
    return None if content is None else pickle.loads(content)


def _exactly(of: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        try:
            part = of.recv(min(count, 1 << 20))
        except (ConnectionResetError, TimeoutError):
            part = b""
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def meet(store: str, rank: int, size: int, device: torch.device) -> groups.Group:
    """Meet the other ranks at the file `store` -> the group that ops run over from now on, with the time that building takes.

    A GPU becomes this thread's current one. Raises RuntimeError where they are not there in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = groups.connect(FileStore(store, size), rank, size, device, MEET_S)
    group.timeout_s = BUILD_S
    groups.register(GROUP, group)
    return group


class Followers:
    """The other ranks' processes."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        on_end: Callable[[str], None] = lambda why: None,
        *,
        all_graphs: bool = True,
    ) -> None:
        """Start them; returns when all are there.

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
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        settings = dataclasses.asdict(dataclasses.replace(config, api_key=None))
        try:
            for rank in range(1, self._size):
                ours, theirs = socket.socketpair()
                ours.settimeout(START_S)
                command = module_command("pagegraph.runtime.engine.rank_process", str(theirs.fileno()))
                with theirs:
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=child_environment()
                    )
                self._processes.append(process)
                self._sockets.append(ours)
                send(ours, settings, rank, str(self._store), all_graphs)
            for rank, one in enumerate(self._sockets, 1):
                here = receive(one)
                threading.Thread(target=self._watch, args=(rank,), name=f"rank-{rank}", daemon=True).start()
                if here is None:
                    raise self.lost(RuntimeError(f"rank {rank} did not start"))
            self._group = meet(str(self._store), 0, self._size, device)
        except BaseException:
            self.stop()
            raise

    @property
    def _store(self) -> Path:
        return self._folder / "store"

    @property
    def pids(self) -> list[int]:
        """Of the processes, by rank from 1 on."""
        return [process.pid for process in self._processes]

    def follow(self, built: BuiltModel, timeout_s: float) -> None:
        """From now on the others launch what `built` launches; a rank may be so many seconds behind.

        Raises RanksLost where one has ended already.
        """
        assert self._group is not None
        self._built = True
        if self._ended.is_set():
            raise self.lost(RuntimeError("it has ended"))
        self._group.timeout_s = timeout_s
        for one in self._sockets:
            one.settimeout(timeout_s)  # a rank that hangs does not read what it is sent
        shutil.rmtree(self._folder, ignore_errors=True)  # they have met
        for which, step in enumerate(built.steps):
            step.lead = _Leading(self, which)
        built.closing = self.stop

    def tell(self, *message: Any) -> None:
        """Send to all. Raises RanksLost."""
        if self._lost is not None:
            raise self._lost
        if self._ended.is_set():
            raise self.lost(RuntimeError("it has ended"))
        try:
            for one in self._sockets:
                send(one, *message)
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
            for process in self._processes:
                process.kill()
            if (
                self._group is not None
            ):  # beside this thread: NCCL lets kernels go, then waits for graphs that hold its calls
                threading.Thread(target=self._group.abort, name="abort", daemon=True).start()
        return self._lost

    def stop(self) -> None:
        """End them; may be called again."""
        self._stopping = True
        groups.forget(GROUP)
        for one in self._sockets:
            one.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._group is not None and self._lost is None:
            self._group.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self, rank: int) -> None:
        process, ours = self._processes[rank - 1], self._sockets[rank - 1]
        status = process.wait()
        if self._stopping:
            return
        how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        said = receive(ours) if select.select([ours], [], [], LOOK_S)[0] else None
        self._told.append(f"rank {rank} of {self._size} ended with {how}{'' if said is None else f': {said[1]}'}")
        self._ended.set()
        if not self._built:
            time.sleep(BETTER_S)
            if self._stopping:
                return
        self._on_end(self._told[-1])
        if self._group is not None and not self._built:
            self._group.abort()  # lets this rank's call return, whose next one raises


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

    Raises what `build` raises, and RanksLost.
    """
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
