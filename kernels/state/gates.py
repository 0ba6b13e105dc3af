"""Triton: what delta rules make of their gates as projected: the decay, and the share of what a token adds. See `kernels.ops`."""

from __future__ import annotations

import triton
import triton.language as tl

from pagegraph.kernels.state.time_steps import stepped


@triton.jit
def log_decay(x, A_log_ptr, dt_bias_ptr, head):
    """Of tokens of a head, float32."""
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    return -rate * stepped(x, tl.load(dt_bias_ptr + head), True, None, None)


@triton.jit
def share(x):
    """sigmoid(x), rounded to x's type."""
    return (1.0 / (1.0 + tl.exp(-x.to(tl.float32)))).to(x.dtype)
