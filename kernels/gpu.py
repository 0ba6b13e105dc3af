"""Whose measured tiles a GPU takes. Knows no kernel.

Every table of tiles is keyed by the GPU it was measured on. A GPU that was not measured takes the H200's tiles, because
those are the only ones measured: tiles decide how fast a kernel is, not what it computes, and the H100 has the same
multiprocessors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal, TypeVar

import torch

Gpu = Literal["H200"]
MEASURED: tuple[Gpu, ...] = ("H200",)  # as in the name that CUDA gives a device
OTHERS_TAKE: Gpu = "H200"
HOPPER = (9, 0)  # the compute capability that kernels for Hopper are for

T = TypeVar("T")


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The measured GPU that the device is, or whose tiles it takes; of the interpreter's CPU likewise."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found: list[Gpu] = [gpu for gpu in MEASURED if gpu in name]
    return found[0] if found else OTHERS_TAKE


def measured(tables: Mapping[Gpu, T], device: torch.device) -> T:
    """Of tables by GPU, the one for the device."""
    return tables[gpu_of(device)]


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent grid for Hopper run at a time; 0 on a device that such kernels are not for."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
