"""Experts of a mixture in plain PyTorch: the specification and the oracle of the tests.

One loop over experts that rounds where transformers' eager experts round. Knows no device and no model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.quant.reference import dequantize


def activate(x: Tensor, activation: str, alpha: float = 1.0) -> Tensor:
    """One of `form.ACTIVATIONS` of x, in its dtype."""
    if activation == "silu":
        return functional.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)
    if activation in ("gelu", "gelu_tanh"):
        return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation in ("relu", "relu2"):
        positive = functional.relu(x)
        return positive if activation == "relu" else positive.square()
    raise ValueError(f"activation {activation!r} of experts is not known; 'silu' is")


def between(product: Tensor, form: Form) -> Tensor:
    """Of the first product [.., 2 * I] what the second takes, [.., I]; [.., I] of [.., I] where nothing is gated."""
    if not form.gated:
        return activate(product, form.activation, form.alpha)
    if form.interleaved:
        gate, up = product[..., ::2], product[..., 1::2]
    else:
        gate, up = product.chunk(2, dim=-1)
    if form.limit > 0:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    if form.shift:
        up = up + form.shift
    return activate(gate, form.activation, form.alpha) * up


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x [N, in] times the weight of one expert, [out, in] or transposed."""
    return functional.linear(x, weight.T if transposed else weight, bias)


def live_rows(chosen: Tensor, query_start: Tensor | None) -> Tensor:
    """bool [T]: which rows are no padding."""
    rows = torch.arange(len(chosen), device=chosen.device)
    return rows < (len(chosen) if query_start is None else query_start[-1])


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    *form: str | float | bool,
) -> Tensor:
    """See `kernels.ops`."""
    how = Form(*form)  # type: ignore[arg-type]
    out = torch.zeros_like(x)
    live = live_rows(chosen, query_start)[:, None]
    for expert in range(len(up)):
        token, choice = torch.where((chosen == expert) & live)
        if not len(token):
            continue
        inner = between(
            product(x[token], up[expert], None if up_bias is None else up_bias[expert], how.transposed), how
        )
        rows = product(inner, down[expert], None if down_bias is None else down_bias[expert], how.transposed)
        out.index_add_(0, token, (rows * weights[token, choice, None]).to(x.dtype))
    return out


def quant_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    up_group: int,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    down_group: int,
    down_bias: Tensor | None,
    query_start: Tensor | None,
    *form: str | float | bool,
) -> Tensor:
    """See `kernels.ops`: the products with the dequantised weights, rounded to x's dtype."""
    wide = (dequantize(up, up_scale, up_zero, up_group), dequantize(down, down_scale, down_zero, down_group))
    first, second = (one.to(x.dtype) for one in wide)
    return experts(x, chosen, weights, first, up_bias, second, down_bias, query_start, *form)
