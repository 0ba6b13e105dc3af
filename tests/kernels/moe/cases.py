"""Random experts for the tests of the op: sizes, routing and what stands between the products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pagegraph.kernels.moe.form import Form

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
