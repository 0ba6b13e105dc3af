"""Triton: what kernels of state space models make of dt. See `kernels.ops`."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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
