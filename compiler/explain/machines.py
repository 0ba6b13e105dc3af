"""What devices can do: published sizes of GPUs that need not be here, and a quick measurement of the one that is.

Knows no model. A floor is true only where the device is not faster than it says: rates are those of the data sheet, or
less where we measured less.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pagegraph.compiler.profile.device_time import group_seconds

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Machine:
    """A device: memory in bytes, rates a second. `source`: where the rates come from."""

    name: str
    memory: int
    bandwidth: float  # bytes
    flops: float  # of dense 16-bit matrix products that add up in 32 bits
    narrow_flops: float  # of products of 8-bit numbers
    capability: tuple[int, int] | None  # compute capability; None: a CPU
    link: float  # bytes in one direction to other GPUs of the host; 0: not known
    source: str

    @property
    def device_type(self) -> str:
        return "cpu" if self.capability is None else "cuda"

    def shared_by(self, ranks: int) -> Machine:
        """What one of so many processes has of it, all of which run at the same time."""
        rates = {name: getattr(self, name) / ranks for name in ("bandwidth", "flops", "narrow_flops")}
        if ranks == 1 or self.device_type == "cuda":  # a GPU each
            return self
        return replace(self, name=f"one of {ranks} shares of {self.name}", **rates)


def _sheet(
    name: str, memory: float, bandwidth: float, flops: float, narrow: float, capability: tuple[int, int], link: float,
    reached: tuple[float, float] = (1.0, 1.0), source: str = "data sheet",
) -> Machine:  # fmt: skip
    """memory in GiB, bandwidth in GB/s, flops in TFLOP/s, link in GB/s; `reached`: shares of bandwidth and flops."""
    of_bandwidth, of_flops = reached
    return Machine(
        name, int(memory * GIB), bandwidth * 1e9 * of_bandwidth, flops * 1e12 * of_flops, narrow * 1e12 * of_flops,
        capability, link * 1e9, source,
    )  # fmt: skip


# Memory is what CUDA reports, a little below what is printed on the box. Bandwidth and dense rates (without sparsity,
# adding up in 32 bits): NVIDIA's data sheets of H200, H100, A100, L40S, L4 and A10 Tensor Core GPUs, the Blackwell
# architecture brief (HGX B200), and the architecture white papers of Ada, Ampere and Blackwell GeForce. 8-bit rates are fp8's;
# where a GPU has no fp8, int8's. Links: NVLink in one direction, else PCIe. The H200's shares were measured with perf/:
# a copy reaches 4.3 TB/s, a large bfloat16 product about 790 TFLOP/s.
GPUS: dict[str, Machine] = {
    "b200": _sheet("NVIDIA B200", 178.3, 7700, 2250, 4500, (10, 0), 900),
    "h200": _sheet(
        "NVIDIA H200", 139.8, 4800, 989, 1979, (9, 0), 450, (4.3 / 4.8, 790 / 989), "data sheet, less what we measured"
    ),
    "h100": _sheet("NVIDIA H100 SXM", 79.2, 3350, 989, 1979, (9, 0), 450),
    "h100-pcie": _sheet("NVIDIA H100 PCIe", 79.2, 2000, 756, 1513, (9, 0), 64),
    "a100": _sheet("NVIDIA A100 SXM 80GB", 79.2, 2039, 312, 624, (8, 0), 300),
    "a100-40gb": _sheet("NVIDIA A100 SXM 40GB", 39.4, 1555, 312, 624, (8, 0), 300),
    "l40s": _sheet("NVIDIA L40S", 44.4, 864, 362, 733, (8, 9), 32),
    "l4": _sheet("NVIDIA L4", 22.0, 300, 121, 242, (8, 9), 32),
    "a10": _sheet("NVIDIA A10", 22.0, 600, 125, 250, (8, 6), 32),
    "rtx5090": _sheet("GeForce RTX 5090", 31.3, 1792, 209.5, 419, (12, 0), 64),
    "rtx4090": _sheet("GeForce RTX 4090", 23.5, 1008, 165.2, 330.3, (8, 9), 32),
    "rtx3090": _sheet("GeForce RTX 3090", 23.6, 936, 71, 284, (8, 6), 32),
}

COPY_BYTES = 256 << 20
MATMUL = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product that is measured
REPEATS = 12
CALLS = 4  # of each repeat on CUDA, back to back: the time of a launch is no part of what a device can do


def named_gpu(name: str) -> Machine:
    """A GPU of the table; raises ValueError naming those there are."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in GPUS:
        raise ValueError(f"--gpu {name} is not in the table; there are {', '.join(GPUS)}")
    return GPUS[key]


def this_machine(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """The device of this process: a GPU of the table by its name, else what a copy and a product reach now."""
    bandwidth, flops = measured_bandwidth(device), measured_flops(device, dtype)
    source = "measured just now, beside whatever else runs"
    if device.type == "cpu":
        return Machine(f"this CPU, {torch.get_num_threads()} threads", _host_memory(), bandwidth, flops, 2 * flops,
                       None, 0.0, source)  # fmt: skip
    torch.cuda.empty_cache()  # of what was measured with: a build counts what is free
    told = torch.cuda.get_device_name(device)
    total = torch.cuda.mem_get_info(device)[1]
    capability = torch.cuda.get_device_capability(device)
    link = next((one.link for one in GPUS.values() if one.name == told), 0.0)
    return Machine(told, total, bandwidth, flops, 2 * flops, capability, link, source)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second of the best of a few copies, read plus written; on CUDA by a kernel, as a step moves bytes."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = (lambda: torch.mul(source, 1.0, out=target)) if device.type == "cuda" else (lambda: target.copy_(source))
    return 2 * COPY_BYTES / _best_seconds(copy, device)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of a few square products of random numbers; of equal ones they take less power."""
    size = MATMUL[device.type]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


def _best_seconds(act: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return min(group_seconds(act, CALLS) for _ in range(REPEATS))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return total
