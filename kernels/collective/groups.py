"""Groups of processes by name, and what their ranks bring together: `pagegraph::all_reduce` and `pagegraph::all_gather`.

All ranks of a group call the same ops on tensors of the same sizes in the same order. A rank that ends lets the others' calls
raise; one that hangs does so after the group's time. Knows a process group of PyTorch, whatever its backend; does not know how
it came about or what is summed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, ReduceOp, Store

LOOPBACK = "127.0.0.1"

_groups: dict[str, Group] = {}


class Group:
    """One rank's end of a group."""

    def __init__(self, processes: Any, timeout_s: float) -> None:
        """processes: a ProcessGroup of PyTorch. timeout_s: that a call waits for the slowest rank; may be set anew at any time."""
        self.processes = processes
        self.timeout_s = timeout_s

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self.timeout_s)


def connect(store: Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Group:
    """Meet the other ranks, all on this machine, at `store`: over the loopback interface on a CPU, by NCCL between GPUs.

    Returns when all are there; raises RuntimeError where they are not in time.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        processes: Any = torch.distributed.ProcessGroupNCCL
        options = processes.Options()
    else:
        processes = torch.distributed.ProcessGroupGloo
        options = processes._Options()
        options._devices, options._threads = [processes.create_device(hostname=LOOPBACK)], 1
    options._timeout = timeout
    return Group(processes(store, rank, size, options), timeout_s)


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
    found, out = _groups[group], x.clone(memory_format=torch.contiguous_format)
    options = AllreduceOptions()
    options.timeout = found.timeout
    found.processes.allreduce([out], options).wait()
    return out


def all_gather(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """Every rank's x [.., n] side by side in the order of ranks -> [.., size * n]."""
    found, own = _groups[group], x.contiguous()
    options = AllgatherOptions()
    options.timeout = found.timeout
    parts = [torch.empty_like(own) for _ in range(size)]
    found.processes.allgather([parts], [own], options).wait()
    return torch.cat(parts, dim=-1)


def least(value: int, group: str, device: torch.device) -> int:
    """The least of every rank's value."""
    found, out = _groups[group], torch.tensor([value], dtype=torch.int64, device=device)
    options: Any = AllreduceOptions()
    options.reduceOp, options.timeout = ReduceOp.MIN, found.timeout
    found.processes.allreduce([out], options).wait()
    return int(out)
