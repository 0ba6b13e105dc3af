"""What launches of kernels share: programmatic dependent launch, and counts of arrivals.

With dependent launch a kernel is set up while the one before it still runs. A kernel launched so has to call `wait` in
every program before it touches memory that an earlier kernel writes or reads; what nobody writes during a step, weights,
may be asked for before. Then it holds for the whole chain that a kernel that is past `wait` sees all kernels before it
done. See the CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; needs compute capability 9.0.

Kernels of a decode step overlap: ours are launched while the one before still runs and wait for it before they touch
what a step writes; a norm's weight, and the first weights of a GEMV, are loaded earlier. Norms, residual
additions and gated SiLU are kernels of ours for that reason alone: by themselves the compiler's are as fast, but
would break the sequence. Asking for unquantised weights to come to L2 before the wait was slower.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ARRIVALS = 65536


@cache
def dependent(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel with the parameter PDL."""
    on = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


@cache
def arrival_counts(device: torch.device) -> torch.Tensor:
    """Counts [ARRIVALS] int32 that kernels whose last program finishes the work share, zero between launches.

    Made once, so that graphs may hold the address; such kernels belong on one stream.
    """
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)


@triton.jit
def wait():
    """The next kernel may be set up; go on when all kernels before this one are done."""
    gdc_launch_dependents()
    gdc_wait()
