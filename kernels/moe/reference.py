"""Experts of a mixture in plain PyTorch: the specification and the oracle of the tests.

One loop over experts that rounds where transformers' eager experts round. Knows no device and no model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.quant.reference import (
    dequantize,
    from_repacked,
    from_repacked_scales,
    pack_codes,
    restored_columns,
)
from pagegraph.kernels.quant.weight import QuantWeight


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


def topk_softmax(logits: Tensor, k: int, renormalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `kernels.ops`."""
    logits = logits.float()
    values, chosen = (one[:, :k] for one in logits.sort(dim=-1, descending=True, stable=True))
    weights = values.softmax(-1) if renormalize else (values - logits.logsumexp(-1, keepdim=True)).exp()
    return weights.to(dtype), chosen.contiguous()


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
    residual: Tensor | None = None,
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
    return out if residual is None else out + residual


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


def in_eights(rows: Tensor, interleaved: bool) -> Tensor:
    """[E, 2 * I, ..] of gate and up, one half each or in turn -> the same rows, of every 16 first 8 of gate and then those of up."""
    gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=1)
    return torch.stack([gate.unflatten(1, (-1, 8)), up.unflatten(1, (-1, 8))], dim=2).flatten(1, 3)


def from_eights(rows: Tensor) -> Tensor:
    """The inverse of `in_eights`: gate and up one half each."""
    return rows.unflatten(1, (-1, 2, 8)).transpose(1, 2).flatten(1, 3)


def loaded(stack: QuantStack) -> QuantWeight:
    """The weights [E, rows, size] as they were loaded, rows as they lie."""
    experts, height = len(stack.qweight), stack.height
    tall, groups = stack.tall, -(-stack.size // stack.group)
    qweight, scale, zero, *_ = tall
    if tall.kind == "fp8":
        qweight = restored_columns(qweight, stack.size)
    else:
        qweight = from_repacked(qweight, len(qweight) * 64, stack.size)
        qweight = pack_codes((qweight + 8).to(torch.uint8)) if tall.kind == "mxfp4" else qweight
        scale, zero = (
            None if one is None else from_repacked_scales(one, experts * height, groups) for one in (scale, zero)
        )
    parts = [
        None if one is None else one.unflatten(0, (experts, height))[:, : stack.rows] for one in (qweight, scale, zero)
    ]
    return QuantWeight(*parts, None, stack.group, stack.rows)  # type: ignore[arg-type]


def repacked_experts(
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
    inner: int,
    query_start: Tensor | None,
    *form: str | float | bool,
    quantize_x: bool = False,
) -> Tensor:
    """See `kernels.ops`: `quant_experts` of the weights as they were loaded; x stays as it is."""
    how = Form(*form)._replace(interleaved=False, transposed=False)  # type: ignore[arg-type]
    hidden, columns = x.shape[1], 2 * inner if how.gated else inner
    first = loaded(QuantStack(up, up_scale, up_zero, up_group, columns, hidden))
    second = loaded(QuantStack(down, down_scale, down_zero, down_group, hidden, inner))
    if how.gated:
        first = first._replace(
            qweight=from_eights(first.qweight),
            scale=from_eights(first.scale),
            zero=None if first.zero is None else from_eights(first.zero),
        )
        up_bias = None if up_bias is None else from_eights(up_bias)
    return quant_experts(
        x, chosen, weights, *first[:3], first.group, up_bias, *second[:3], second.group, down_bias, query_start, *how
    )
