"""Triton: the experts of each token, those of its largest scores, and their shares; a program a token.

PyTorch selects, sorts, normalises and narrows in a kernel each, none of which is set up while the one before runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait


@triton.jit
def topk_softmax_kernel(
    weights_ptr,
    chosen_ptr,
    logits_ptr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    place = tl.arange(0, CHOICES)
    if PDL:
        wait()
    logits = tl.load(logits_ptr + row * EXPERTS + lane, mask=lane < EXPERTS, other=-float("inf")).to(tl.float32)
    largest = tl.max(logits, 0)
    total = tl.sum(tl.exp(logits - largest), 0)
    values = tl.full([CHOICES], -float("inf"), tl.float32)
    chosen = tl.zeros([CHOICES], tl.int32)
    for at in tl.static_range(K):
        value, expert = tl.max(logits, 0, return_indices=True)
        values = tl.where(place == at, value, values)
        chosen = tl.where(place == at, expert, chosen)
        logits = tl.where(lane == expert, -float("inf"), logits)
    weights = tl.exp(values - largest)
    if RENORMALIZE:
        total = tl.sum(weights, 0)
    at = row * K + place
    tl.store(weights_ptr + at, (weights / total).to(weights_ptr.dtype.element_ty), mask=place < K)
    tl.store(chosen_ptr + at, chosen.to(tl.int64), mask=place < K)


def topk_softmax(logits: Tensor, k: int, renormalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `kernels.ops`."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = torch.empty(tokens, k, dtype=dtype, device=logits.device)
    chosen = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    if tokens:
        block = triton.next_power_of_2(experts)
        topk_softmax_kernel[(tokens,)](
            weights,
            chosen,
            logits,
            EXPERTS=experts,
            K=k,
            RENORMALIZE=renormalize,
            BLOCK=block,
            CHOICES=triton.next_power_of_2(k),
            num_warps=1 if block <= 256 else 4,
            **dependent(logits.device),
        )
    return weights, chosen
