"""Random experts for the tests of the op: sizes, routing and what stands between the products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagegraph.compiler.quantization.layouts import RepackedExperts
from pagegraph.compiler.quantization.linear import QuantExperts
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.moe.reference import in_eights
from pagegraph.kernels.quant.reference import E2M1, pack_codes, pack_nibbles, quantize_groups, quantize_rows
from pagegraph.kernels.quant.weight import QuantWeight

GPT_OSS = Form("silu", 1.702, 2.0, 1.0, True, True, True)
FORMS = {
    "silu": Form(),
    "gpt_oss": GPT_OSS,
    "halves": GPT_OSS._replace(interleaved=False, transposed=False),
    "capped silu": Form(limit=1.0),
    "gelu": Form("gelu"),
    "gelu_tanh, transposed": Form("gelu_tanh", transposed=True),
    "relu2, not gated": Form("relu2", gated=False),
    "silu, not gated, transposed": Form(gated=False, transposed=True),
    "relu, in turn": Form("relu", interleaved=True),
}
ROUTINGS = ("random", "all to one", "one each", "none of some")


class Experts(NamedTuple):
    """The arguments of `pagegraph::experts` ahead of the form."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    query_start: Tensor | None


def experts_of(
    tokens: int,
    choices: int,
    experts: int,
    hidden: int = 48,
    inner: int = 24,
    form: Form = FORMS["silu"],
    routing: str = "random",
    bias: bool = False,
    live: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Experts:
    """live: rows from there on are padding that holds NaN, and chooses experts as padding does."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    first = 2 * inner if form.gated else inner
    up, down = (first, hidden), (hidden, inner)
    if form.transposed:
        up, down = up[::-1], down[::-1]
    scores = torch.rand(tokens, experts, generator=generator)
    if routing == "all to one":  # the rest go where they like
        scores[:, experts // 2] = 2
    elif routing == "one each":
        scores = torch.eye(experts)[torch.arange(tokens) % experts] + 0.1 * scores
    elif routing == "none of some":
        scores[:, choices : choices + experts // 2] = -1
    chosen = scores.topk(choices, dim=1).indices
    x, query_start = normal(tokens, hidden), None
    if live is not None:
        x[live:] = torch.nan
        query_start = torch.tensor([0, live, live], dtype=torch.int32)
    return Experts(
        x,
        chosen,
        torch.rand(tokens, choices, generator=generator).to(dtype),
        normal(experts, *up, scale=hidden**-0.5),
        normal(experts, first) if bias else None,
        normal(experts, *down, scale=inner**-0.5),
        normal(experts, hidden) if bias else None,
        query_start,
    )


KINDS = (
    "int8 row",
    "int8 group zero",
    "int4",
    "int4 row",
    "int4 symmetric",
    "fp8 row",
    "fp8 block",
    "fp8 ragged",
    "mxfp4",
)


def quantised_of(given: Experts, kind: str) -> tuple[Tensor | int | None, ...]:
    """The same as arguments of `pagegraph::quant_experts`, with weights quantised as `kind` says."""
    up, down = _quantised(given.up, kind), _quantised(given.down, kind)
    return *given[:3], *up, given.up_bias, *down, given.down_bias, given.query_start


def _quantised(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """weight [E, N, K] -> qweight, scale, zero and columns of a group."""
    size = weight.shape[2]
    if kind == "mxfp4":
        groups = weight.unflatten(2, (-1, 32))
        exponents = groups.abs().amax(3).log2().floor().sub(2)
        steps = torch.tensor(E2M1[:8])
        scaled = groups / exponents.exp2()[..., None]
        codes = (scaled.abs()[..., None] - steps).abs().argmin(-1) + 8 * (scaled < 0)
        return pack_codes(codes.flatten(2).to(torch.uint8)), (exponents + 127).to(torch.uint8), None, 32
    if kind in ("int8 row", "fp8 row"):
        return *quantize_rows(weight, torch.int8 if kind == "int8 row" else torch.float8_e4m3fn), None, size
    if kind.startswith("fp8"):
        group = 128 if kind == "fp8 block" else 96  # the last group of 256 or 512 columns is smaller
        scale = torch.rand(*weight.shape[:2], -(-size // group), generator=torch.Generator().manual_seed(1)) + 0.5
        return (4 * weight).to(torch.float8_e4m3fn), scale / 4, None, group
    if kind == "int8 group zero":
        qweight, scale = quantize_rows(weight.unflatten(2, (-1, 64)), torch.int8)
        return qweight.flatten(2), scale[..., 0], 0.01 * scale[..., 0], 64
    group = size if kind == "int4 row" else 32
    qweight, scale, zero = (one.unflatten(0, weight.shape[:2]) for one in quantize_groups(weight.flatten(0, 1), group))
    return pack_nibbles(qweight), scale, None if kind == "int4 symmetric" else zero, group


def repacked_of(quantised: tuple[Any, ...], form: Form, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """The same as arguments of `pagegraph::repacked_experts`."""
    up, up_bias, down, down_bias, query_start = quantised[3:7], quantised[7], quantised[8:12], *quantised[12:]
    first, second = (
        RepackedExperts(
            QuantExperts(QuantWeight(*one[:3], None, one[3], one[0].shape[1]), dtype), gated, form.interleaved
        )
        for one, gated in ((up, form.gated), (down, False))
    )
    if form.gated and up_bias is not None:
        up_bias = in_eights(up_bias, form.interleaved)
    return (
        *quantised[:3], first.qweight, first.scale, first.zero, first.group, up_bias, second.qweight, second.scale, second.zero,
        second.group, down_bias, second.in_features, query_start,
    )  # fmt: skip


def stacks_of(repacked: tuple[Any, ...], form: Form) -> tuple[Any, ...]:
    """The same as the launcher of its kernels takes them."""
    hidden, inner = repacked[0].shape[1], repacked[13]
    up = QuantStack(*repacked[3:7], 2 * inner if form.gated else inner, hidden)
    down = QuantStack(*repacked[8:12], hidden, inner)
    return *repacked[:3], up, repacked[7], down, repacked[12], repacked[14]
