"""RMS norm, gated SiLU and a pair of linears around them in plain PyTorch: the specification and the oracle of the tests.

Rounds where transformers' modules round. Knows no device.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.ops`; rounds as transformers' modules do."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype) if weight.dtype == x.dtype else (weight * scaled).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.ops`."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, gate_first: bool
) -> torch.Tensor:
    """See `kernels.ops`; float32 inside, but for what transformers' modules round."""
    opened, wide = torch.nn.functional.silu(gate.float()), x.float()
    wide = wide * opened if gate_first else wide
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    scaled = weight.view(-1, x.shape[2]) * scaled
    return (scaled if gate_first else scaled * opened).to(gate.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.ops`; float32 inside."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool = False) -> torch.Tensor:
    """See `kernels.ops`."""
    product = torch.nn.functional.linear(x, weight, bias)
    return silu_mul(product) if gated else product


def linear_norm_linear(
    x: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    second: torch.Tensor,
    second_bias: torch.Tensor | None,
    gated: bool,
    keep_norm: bool,
    query_start: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual + linear(x, first), linear of its RMS norm, gated or not, the norm if it is kept)."""
    total, normed = add_rms_norm(residual, linear(x, first, first_bias), norm, eps)
    out = linear(normed, second, second_bias, gated)
    return total, out, normed if keep_norm else normed.new_empty(0)


def norm_linear(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gated: bool,
    query_start: torch.Tensor,
) -> torch.Tensor:
    """See `kernels.ops`."""
    return linear(rms_norm(x, norm, eps), weight, bias, gated)
