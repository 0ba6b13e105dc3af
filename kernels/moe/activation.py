"""Triton: what stands between the two products of experts, in float32; see `kernels.moe.form`. NaN stays NaN. Knows no memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def limited(gate, up, LIMIT: tl.constexpr):
    """Both as they are within their limits: gate from above, up from both sides."""
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate, tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 is sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "relu2", "an activation that kernels.moe.form does not name")
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive


@triton.jit
def gate_times(
    gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    if LIMIT > 0:
        gate, up = limited(gate, up, LIMIT)
    return activate(gate, ACTIVATION, ALPHA) * (up + SHIFT)
