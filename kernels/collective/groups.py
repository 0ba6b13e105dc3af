"""Groups of processes by name, and what their ranks bring together: `pagegraph::all_reduce` and `pagegraph::all_gather`.

All ranks of a group call the same ops on tensors of the same sizes in the same order. Between GPUs an op is launched on the current
stream and not waited for, so that a CUDA graph may hold it; sums of a few rows go through memory that ranks share
(`kernels.collective.one_shot`), where there is a way to it. A rank that ends lets calls over gloo raise, and one that hangs does
so after the group's time. NCCL's calls raise nothing: kernels wait on the device, for ever, until `Group.abort`; who waits for
them has to look after the other ranks. What ranks agree on before they compute goes over gloo on every device. Knows process groups of PyTorch; does not
know how they came about or what is summed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    Store,
)

log = logging.getLogger("pagegraph.ranks")

LOOPBACK = "127.0.0.1"
CLOSE_S = 10.0
# PyTorch's own watch over NCCL ends the process, without a word to who waits, when a call takes long or a graph is captured for
# long. Ranks are watched by who started them.
UNWATCHED = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}

_groups: dict[str, Group] = {}


class Group:
    """One rank's end of a group."""

    def __init__(self, processes: Any, timeout_s: float, host: Any = None) -> None:
        """processes: a ProcessGroup of PyTorch for tensors of the device. host: one of the same ranks over gloo, if that is another.

        timeout_s: that a call over gloo waits for the slowest rank; may be set anew at any time.
        """
        self.processes = processes
        self.host = host or processes
        self.timeout_s = timeout_s
        self.one_shot: Any = None  # OneShot: sums of a few rows between GPUs that reach each other's memory
        self._memory: Any = None

    def share_memory(self, store: Store, rank: int, size: int, device: torch.device) -> None:
        """Let sums of a few rows go through memory of all ranks, which have to call it together; or say why they do not.

        A group of the name "" is this one.
        """
        from pagegraph.kernels.collective.one_shot import OneShot, bytes_of
        from pagegraph.kernels.collective.peer_memory import PeerMemory

        def together(mine: bool) -> bool:
            return bool(least([int(mine)], "")[0])

        try:
            self._memory = PeerMemory(store, rank, size, bytes_of(size), together)
        except RuntimeError as error:
            log.warning("sums over %d GPUs all go by NCCL: %s", size, error)
            return
        one_shot, right = OneShot(rank, self._memory.addresses, device), True
        for count in (1, 3000, 200_000):  # fewer than a program has, several programs, several blocks of each
            x = torch.arange(count, device=device, dtype=torch.float32).remainder(97).add(rank)
            if one_shot.takes(x):
                right = right and torch.equal(one_shot.all_reduce(x), all_reduce(x, ""))
        if together(right):
            self.one_shot = one_shot
        else:
            log.warning("sums over %d GPUs all go by NCCL: those through shared memory were wrong", size)
            self._memory.close()

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self.timeout_s)

    @property
    def raises(self) -> bool:
        """Whether calls end by themselves, by an error, where a rank has ended or hangs."""
        return self.processes is self.host

    def abort(self) -> None:
        """End calls that wait on a GPU for a rank that will not come; the group is of no use from then on. Any thread may call, and
        may wait there as long as CUDA graphs hold calls of the group.

        Over gloo calls end by themselves.
        """
        if not self.raises:
            if self.one_shot is not None:
                self.one_shot.stop()
            self.processes.abort()

    def close(self) -> None:
        """End this rank's end, where no call is under way and no CUDA graph holds one; waits `CLOSE_S` at most.

        Without it the last reference to the group would do so, wherever that is, and for as long as a graph is left.
        """
        if not self.raises:
            ending = threading.Thread(target=self.processes.abort, name="close-group", daemon=True)
            ending.start()
            ending.join(CLOSE_S)
            if self.one_shot is not None:
                self._memory.close()


def connect(
    store: Store, rank: int, size: int, device: torch.device, timeout_s: float, address: str | None = None
) -> Group:
    """Meet the other ranks at `store`: over sockets on a CPU, by NCCL between GPUs.

    address: of this machine, that all ranks reach; None: all are on it. Returns when all are there; raises
    RuntimeError where they are not in time.
    """
    timeout = timedelta(seconds=timeout_s)
    host = _gloo(PrefixStore("host", store), rank, size, timeout, address or LOOPBACK)
    if device.type == "cpu":
        return Group(host, timeout_s)
    group = Group(_nccl(PrefixStore("device", store), rank, size, timeout), timeout_s, host)
    register("", group)
    try:  # what connects them is made at the first call, which may not be in a CUDA graph
        found = all_reduce(torch.ones(1, device=device), "")
        if address is None:
            group.share_memory(PrefixStore("memory", store), rank, size, device)
    finally:
        forget("")
    if int(found) != size:
        raise RuntimeError(f"a sum of ones over {size} ranks by NCCL gave {found.item()}")
    return group


def _gloo(store: Store, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    kind: Any = ProcessGroupGloo
    options = kind._Options()
    options._devices, options._threads = [kind.create_device(hostname=address)], 1
    options._timeout = timeout
    return kind(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    if not torch.distributed.is_nccl_available():
        raise RuntimeError(
            f"{size} GPUs share a model by NCCL, and this PyTorch {torch.__version__} was built without it"
        )
    for name, value in UNWATCHED.items():
        os.environ.setdefault(name, value)
    processes: Any = torch.distributed.ProcessGroupNCCL
    options = processes.Options()
    options._timeout = timeout
    return processes(store, rank, size, options)


def register(name: str, group: Group) -> None:
    """Make `group` what ops called with `name` run over."""
    _groups[name] = group


def is_known(name: str) -> bool:
    """Whether ops may be called with this name."""
    return name in _groups


def forget(name: str) -> None:
    """Undo `register`; a name that is not known is left alone."""
    _groups.pop(name, None)


def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of every rank's x [..], in x's dtype, as a tensor of its own; the same bits on all ranks."""
    found = _groups[group]
    if found.one_shot is not None and found.one_shot.takes(x):
        return found.one_shot.all_reduce(x.contiguous())
    out = x.clone(memory_format=torch.contiguous_format)
    options = AllreduceOptions()
    options.timeout, options.asyncOp = found.timeout, False  # on the current stream
    _wait(found.processes.allreduce([out], options))
    return out


def all_gather(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """Every rank's x [.., n] side by side in the order of ranks -> [.., size * n]."""
    found, own = _groups[group], x.contiguous()
    options = AllgatherOptions()
    options.timeout, options.asyncOp = found.timeout, False
    parts = own.new_empty(size * own.shape[0], *own.shape[1:])
    _wait(found.processes._allgather_base(parts, own, options))
    return parts.view(size, *own.shape).movedim(0, -2).reshape(*own.shape[:-1], size * own.shape[-1])


def _wait(work: Any) -> None:
    """For what runs over gloo; NCCL gives nothing to wait for where it launches on the current stream."""
    if work is not None:
        work.wait()


def least(values: Sequence[int], group: str) -> list[int]:
    """Of each value the least of all ranks'. Raises RuntimeError where a rank has ended."""
    found, out = _groups[group], torch.tensor(values, dtype=torch.int64)
    options: Any = AllreduceOptions()
    options.reduceOp, options.timeout = ReduceOp.MIN, found.timeout
    found.host.allreduce([out], options).wait()
    return out.tolist()
