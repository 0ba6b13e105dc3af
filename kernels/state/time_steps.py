"""Triton: what kernels of state space models make of dt. See `kernels.ops`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait

BLOCK = 1024
NUM_WARPS = 4


class Steps(NamedTuple):
    """Arguments of the op that are about dt [T, H]."""

    dt: Tensor
    bias: Tensor | None
    softplus: bool
    least: float | None
    most: float | None

    @property
    def constants(self) -> dict[str, Any]:
        """What `stepped` takes."""
        return dict(SOFTPLUS=self.softplus, LEAST=self.least, MOST=self.most)


@triton.jit
def stepped(dt, bias, SOFTPLUS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """float32 of dt and of the bias of its head, which is not read where it is None."""
    dt = dt.to(tl.float32)
    if bias is not None:
        dt += bias.to(tl.float32)
    if SOFTPLUS:
        # 1 + e loses what a small e has beyond it: of these it is the series, right to 2e-7 there; behind 20 it is dt itself.
        e = tl.exp(tl.minimum(dt, 20.0))
        few = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * 0.25)))
        dt = tl.where(dt > 20.0, dt, tl.where(e < 0.03, few, tl.log(1.0 + e)))
    if LEAST is not None:
        dt = tl.maximum(dt, LEAST)
    if MOST is not None:
        dt = tl.minimum(dt, MOST)
    return dt


@triton.jit(do_not_specialize=["count"])
def time_steps_kernel(
    out_ptr, dt_ptr, bias_ptr, dt_stride, count,
    H: tl.constexpr, SOFTPLUS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, head = place < count, (place % H).to(tl.int32)
    dt = tl.load(dt_ptr + place // H * dt_stride + head, mask=inside, other=0.0)
    bias = None if bias_ptr is None else tl.load(bias_ptr + head, mask=inside, other=0.0)
    tl.store(out_ptr + place, stepped(dt, bias, SOFTPLUS, LEAST, MOST), mask=inside)


def made_steps(steps: Steps) -> Steps:
    """Steps that are to be taken as they are: float32, contiguous."""
    dt = steps.dt
    out = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
    time_steps_kernel[(triton.cdiv(dt.numel(), BLOCK),)](
        out, dt, steps.bias, dt.stride(0), dt.numel(), H=dt.shape[1], BLOCK=BLOCK, num_warps=NUM_WARPS, **steps.constants,
        **dependent(dt.device),
    )  # fmt: skip
    return Steps(out, None, False, None, None)
