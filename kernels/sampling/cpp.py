"""`sample` on a CPU in C++: microseconds, by PyTorch's calls in cold caches twenty times that.

Where it is not built, `kernels.sampling.cpu` does it. Knows no scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pagegraph.kernels import cpp_extension
from pagegraph.kernels.sampling import cpu

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = ["int16_t*", "int64_t*", "float*"] + ["int32_t*"] * 5 + ["int64_t"] * 3

_kernel: Callable | None = None


def build() -> None:
    """From here on `sample` runs it."""
    global _kernel
    _kernel = cpp_extension.built(SOURCE, ARGUMENTS, "tokens are drawn by PyTorch's calls, which take longer")


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, slots: Tensor, sampled: Tensor, *last: Tensor
) -> Tensor:
    """See `kernels.ops`. Noise is made for the sequences with a temperature only."""
    if _kernel is None or logits.dtype not in (torch.bfloat16, torch.float32) or not logits.is_contiguous():
        return cpu.sample(logits, temperature, seeds, positions, slots, sampled, *last)
    ids = slots.new_empty(len(logits), dtype=torch.int64)
    cpu.sample_with_noise(ids, logits, temperature, seeds, positions)
    _kernel(logits, ids, temperature, slots, sampled, positions, *last, *logits.shape, logits.element_size())
    return ids
