"""Ops over recurrent state in plain PyTorch, token by token: the specification and the oracle of the tests. Knows no device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def sequences(slots: Tensor, query_start: Tensor, seq_lens: Tensor) -> Iterator[tuple[int, slice, bool]]:
    """Slot, rows, and whether it begins with them, of each sequence of a step that has rows."""
    bounds = query_start.tolist()
    for slot, begin, end, length in zip(slots.tolist(), bounds, bounds[1:], seq_lens.tolist()):
        if end > begin:
            yield slot, slice(begin, end), length == end - begin


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor,
    silu: bool,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    out, taps = torch.zeros_like(x), weight.float().T  # [K, C]
    for slot, rows, begins in sequences(slots, query_start, seq_lens):
        before = torch.zeros_like(states[slot]) if begins else states[slot]
        seen = torch.cat([before, x[rows].to(states.dtype)])  # [K - 1 + tokens, C]
        for at in range(rows.start, rows.stop):
            found = (seen[at - rows.start :][: len(taps)].float() * taps).sum(0)
            found = found if bias is None else found + bias.float()
            out[at] = (torch.nn.functional.silu(found) if silu else found).to(out.dtype)
        states[slot] = seen[rows.stop - rows.start :]
    return out


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor,
    query_start: Tensor, seq_lens: Tensor, normalize: bool,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    out = torch.zeros_like(value)
    queries, keys = (unit(one.float()) if normalize else one.float() for one in (query, key))
    kept = decay.float().exp().view(*decay.shape[:2], -1, 1)
    for slot, rows, begins in sequences(slots, query_start, seq_lens):
        state = torch.zeros_like(states[slot]) if begins else states[slot].clone()  # [H, D, Dv]
        for at in range(rows.start, rows.stop):
            state = state * kept[at]
            known = (state * keys[at, :, :, None]).sum(1)
            change = (value[at].float() - known) * beta[at].float()[:, None]
            state = state + keys[at, :, :, None] * change[:, None]
            out[at] = ((state * queries[at, :, :, None]).sum(1) * query.shape[2] ** -0.5).to(out.dtype)
        states[slot] = state
    return out


def unit(x: Tensor) -> Tensor:
    """Each row divided by its length."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, slots: Tensor, query_start: Tensor,
    seq_lens: Tensor,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    heads = x.shape[1]
    out = torch.zeros_like(x, dtype=torch.float32)
    B, C = (one.float().repeat_interleave(heads // one.shape[1], 1) for one in (B, C))  # [T, H, N]
    rates = A.float().view(heads, 1, -1)
    for slot, rows, begins in sequences(slots, query_start, seq_lens):
        state = torch.zeros_like(states[slot]) if begins else states[slot].clone()  # [H, P, N]
        for at in range(rows.start, rows.stop):
            step = dt[at].float()[:, None, None]
            state = state * (step * rates).exp() + step * B[at, :, None] * x[at].float()[:, :, None]
            out[at] = (state * C[at, :, None]).sum(-1)
        states[slot] = state
    return out
