"""Ops over recurrent state on a CPU: a sequence at a time, its tokens in chunks of matrix products. Knows no scheduling.

A sequence's state stays in the processor's cache while its tokens are computed, which gathering the states of all
sequences would not let it do.

With c the running sum of a chunk's log decays and S the state before it, both recurrences unfold to products of matrices:
what a token adds is decayed by exp(c_t - c_s) when a later one reads it, and S by exp(c_t). Of the gated delta rule, what the
tokens add depends on what those before them in the chunk have added, which is one triangular system (Yang et al., 2024,
"Gated Delta Networks", section 3.3); state space models add what does not depend on the state (Dao and Gu, 2024,
"Transformers are SSMs", section 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.kernels.state.reference import (
    accepted_inputs,
    gates,
    keep_drafts,
    of_each_head,
    rates_of,
    sequences,
    time_steps,
    unit,
)

CHUNK = 64  # tokens
# With a decay for each channel, or each element of the state, a chunk has a tensor of that many times its tokens.
SMALL_CHUNK = 16


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor,
    silu: bool, draft_rows: Tensor | None = None, state_lens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    out, taps = x.new_zeros(x.shape), weight.float().T
    for one in sequences(slots, query_start, seq_lens, draft_rows, state_lens):
        state, rows = states[one.slot], one.rows
        tokens = rows.stop - rows.start
        before = torch.zeros_like(state) if one.begins else state
        accepted = accepted_inputs(one, draft_rows, (x,))
        seen = torch.cat([before, *accepted, x[rows].to(state.dtype)])
        numbers = seen[one.accepted :].float()
        found = numbers[:tokens] * taps[0]
        for at in range(1, len(taps)):
            found.addcmul_(numbers[at : at + tokens], taps[at])
        if bias is not None:
            found += bias.float()
        out[rows] = functional.silu(found, inplace=True) if silu else found
        state.copy_(seen[one.behind :][: len(state)])
        keep_drafts(one, draft_rows, (x,))
    return out


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor,
    query_start: Tensor, seq_lens: Tensor, normalize: bool, draft_rows: Tensor | None = None,
    state_lens: Tensor | None = None, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    if A_log is not None and dt_bias is not None:
        decay, beta = gates(decay, beta, A_log, dt_bias)
    query, key = (of_each_head(one, value.shape[1]) for one in (query, key))
    out, inputs = value.new_zeros(value.shape), (key, value, decay, beta)
    step = states, slots, query_start, seq_lens, draft_rows, state_lens
    for state, given, rows in _chunks(*step, inputs, CHUNK if decay.dim() == 2 else SMALL_CHUNK):
        read = given[0] if rows is None else query[rows]
        q, k, v, logs, b = (one.transpose(0, 1).float() for one in (read, *given))
        q, k = (unit(q), unit(k)) if normalize else (q, k)
        found = _delta_chunk(state, q * q.shape[2] ** -0.5, k, v, _summed(logs, 1), b)
        if rows is not None:
            out[rows] = found.transpose(0, 1)
    return out


def _chunks(
    states: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor, draft_rows: Tensor | None,
    state_lens: Tensor | None, inputs: tuple[Tensor, ...], size: int,
) -> Iterator[tuple[Tensor, Sequence[Tensor], slice | None]]:  # fmt: skip
    """Of each sequence, in order: a state, up to `size` rows of `inputs` that it is to take up, and which rows those are.

    The state is the slot's, zero where the sequence begins; of draft tokens a copy of it. Rows that the step before had, of draft
    tokens accepted since, are None.
    """
    for one in sequences(slots, query_start, seq_lens, draft_rows, state_lens):
        state = states[one.slot]
        if one.begins:
            state.zero_()
        if one.accepted:
            yield state, accepted_inputs(one, draft_rows, inputs), None
        for rows in _pieces(one.own, size):
            yield state, [each[rows] for each in inputs], rows
        if one.drafts:
            keep_drafts(one, draft_rows, inputs)
            state = state.clone()
            for rows in _pieces(slice(one.own.stop, one.rows.stop), size):
                yield state, [each[rows] for each in inputs], rows


def _pieces(rows: slice, size: int) -> Iterator[slice]:
    for first in range(rows.start, rows.stop, size):
        yield slice(first, min(first + size, rows.stop))


def _delta_chunk(state: Tensor, q: Tensor, k: Tensor, v: Tensor, logs: Tensor, beta: Tensor) -> Tensor:
    """q, k [H, n, D], v [H, n, Dv], logs float64 [H, n] or [H, n, D], summed up, beta [H, n] -> [H, n, Dv]; changes state [H, D, Dv]."""
    tokens = k.shape[1]
    logs = logs.view(*logs.shape[:2], -1)  # [H, n, 1 or D]
    reading = logs.float().exp()
    added = (v - (k * reading) @ state) * beta[..., None]
    # Of a token with one before it, or with itself: query or key with key, decayed from the one to the other.
    seen_by_query, seen_by_key = _pairs(q, k, logs)
    if tokens > 1:
        added = torch.linalg.solve_triangular(seen_by_key * beta[..., None], added, upper=False, unitriangular=True)
    out = (q * reading) @ state + seen_by_query @ added
    state.mul_(reading[:, -1, :, None]).baddbmm_((k * (logs[:, -1:] - logs).float().exp()).mT, added)
    return out


def _summed(logs: Tensor, dim: int) -> Tensor:
    """Running sums as float64: of strong decays their differences would lose what counts."""
    return logs.cumsum(dim, dtype=torch.float64)


def _between(logs: Tensor) -> Tensor:
    """Decays [H, n, n, ..] from each token to each, 0 from later ones, of sums float64 [H, n, ..]."""
    later = (
        torch.ones(logs.shape[1], logs.shape[1], dtype=torch.bool)
        .triu(1)
        .view(*2 * [logs.shape[1]], *[1] * (logs.dim() - 2))
    )
    return (logs[:, :, None] - logs[:, None]).float().masked_fill_(later, -torch.inf).exp_()


def _pairs(q: Tensor, k: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Products [H, n, n] of queries with keys and of keys with keys, decayed; 0 for later keys. logs [H, n, 1 or D]."""
    between = _between(logs)
    if logs.shape[2] == 1:
        return (q @ k.mT).mul_(between[..., 0]), (k @ k.mT).mul_(between[..., 0])
    between *= k[:, None]
    return (between @ q[..., None])[..., 0], (between @ k[..., None])[..., 0]


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    dt_min: float | None, dt_max: float | None, A_log: bool, states: Tensor, slots: Tensor, query_start: Tensor,
    seq_lens: Tensor, draft_rows: Tensor | None = None, state_lens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    out = x.new_zeros(x.shape, dtype=torch.float32)
    dt = time_steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    compute, size = (_scan_chunk, CHUNK) if A.dim() == 1 else (_scan_tokens, SMALL_CHUNK)
    rates, step = rates_of(A, A_log), (states, slots, query_start, seq_lens, draft_rows, state_lens)
    for state, given, rows in _chunks(*step, (x, dt, B), size):
        read, found = (
            (given[2], torch.empty_like(given[0], dtype=torch.float32)) if rows is None else (C[rows], out[rows])
        )
        compute(state, rates, *(one.float() for one in (*given, read)), found)
    return out if D is None else out.addcmul_(D.float()[:, None], x.float())


def _scan_chunk(state: Tensor, rates: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, out: Tensor) -> None:
    """One decay a head: x and out [n, H, P], dt [n, H], B and C [n, G, N]; changes state [H, P, N]."""
    share = state.shape[0] // B.shape[1]
    logs = _summed((dt * rates).T, 1)  # [H, n]
    added = (x * dt[..., None]).transpose(0, 1)  # [H, n, P]
    B, C = B.transpose(0, 1), C.transpose(0, 1)  # [G, n, N]
    seen = _between(logs).mul_((C @ B.mT).repeat_interleave(share, 0))  # [H, n, n]
    B, C = (one.repeat_interleave(share, 0) for one in (B, C))
    found = (C * logs.float().exp()[..., None]) @ state.mT + seen @ added
    out.copy_(found.transpose(0, 1))
    last = logs[:, -1:]
    state.mul_(last.float().exp()[..., None]).baddbmm_((added * (last - logs).float().exp()[..., None]).mT, B)


def _scan_tokens(state: Tensor, rates: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, out: Tensor) -> None:
    """A decay for each element, rates [H, N]; other sizes as of `_scan_chunk`."""
    share = state.shape[0] // B.shape[1]
    B, C = (one.repeat_interleave(share, 1) if B.shape[1] > 1 else one for one in (B, C))  # [n, H or 1, N]
    decays = (dt[..., None] * rates).exp_()  # [n, H, N]
    added = (x * dt[..., None])[..., None] * B[:, :, None]  # [n, H, P, N]
    for at in range(len(dt)):
        state.mul_(decays[at, :, None]).add_(added[at])
        torch.sum(state * C[at, :, None], -1, out=out[at])
