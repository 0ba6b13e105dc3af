"""Ops over recurrent state in plain PyTorch, token by token: the specification and the oracle of the tests. Knows no device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Sequence(NamedTuple):
    """One of a step, of those that have rows."""

    slot: int
    rows: slice  # of its own and of draft tokens, which come last
    drafts: int  # how many of the rows are draft tokens'
    before: int  # tokens that it had before the rows
    accepted: int  # the last of these, draft tokens that its state is still without

    @property
    def begins(self) -> bool:
        return self.before == 0

    @property
    def own(self) -> slice:
        return slice(self.rows.start, self.rows.stop - self.drafts)

    @property
    def behind(self) -> int:
        """Of the accepted draft tokens and the rows, in order, those that the state is to be behind."""
        return self.accepted + self.own.stop - self.own.start


def sequences(
    slots: Tensor, query_start: Tensor, seq_lens: Tensor, draft_rows: Tensor | None, state_lens: Tensor | None
) -> Iterator[Sequence]:
    """Those of a step that have rows; with `draft_rows`, rows of their own that follow a single one in the same slot are its draft tokens."""
    bounds, owners, lengths = query_start.tolist(), slots.tolist(), seq_lens.tolist()
    at = 0
    while at < len(owners):
        slot, begin, own_end = owners[at], bounds[at], bounds[at + 1]
        before, end, at = lengths[at] - (own_end - begin), own_end, at + 1
        if own_end == begin:
            continue
        accepted = 0
        if draft_rows is not None and slot < len(draft_rows):
            assert state_lens is not None
            most = most_drafts(draft_rows)
            while own_end - begin == 1 and at < len(owners) and owners[at] == slot and bounds[at + 1] - end == 1:
                end, at = end + 1, at + 1
            if end - own_end > most:
                raise ValueError(f"{end - own_end} draft tokens in a slot that has room for {most}")
            accepted = min(max(before - int(state_lens[slot]), 0), most) if before else 0
        yield Sequence(slot, slice(begin, end), end - own_end, before, accepted)


def most_drafts(draft_rows: Tensor) -> int:
    """Draft tokens that a slot may have in a step: their rows and those of the step before lie in different places."""
    return draft_rows.shape[1] // 2


def _places(draft_rows: Tensor, position: int, count: int) -> list[int]:
    """Of so many tokens from this position on."""
    return [(position + at) % draft_rows.shape[1] for at in range(count)]


def accepted_inputs(one: Sequence, draft_rows: Tensor | None, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Rows [accepted, ..] of the accepted draft tokens, as `inputs` [T, ..] were in the step before."""
    if draft_rows is None or not one.accepted:
        return [each.new_empty(0, *each.shape[1:]) for each in inputs]
    rows = draft_rows[one.slot, _places(draft_rows, one.before - one.accepted, one.accepted)]
    parts = rows.split([each[0].numel() for each in inputs], -1)
    return [part.reshape(-1, *each.shape[1:]) for part, each in zip(parts, inputs)]


def keep_drafts(one: Sequence, draft_rows: Tensor | None, inputs: tuple[Tensor, ...]) -> None:
    """Put the rows of a sequence's draft tokens aside."""
    if draft_rows is not None and one.drafts:
        rows = slice(one.own.stop, one.rows.stop)
        kept = torch.cat([each[rows].flatten(1).to(draft_rows.dtype) for each in inputs], 1)
        draft_rows[one.slot, _places(draft_rows, one.before + 1, one.drafts)] = kept


def count_states(state_lens: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor) -> None:
    """See `kernels.ops`."""
    rows = query_start.diff()
    first = rows > 0
    first[1:] &= (slots[1:] != slots[:-1]) | (rows[1:] != 1) | (rows[:-1] != 1)
    counted = torch.cat([state_lens, state_lens[:1]])  # what is of no sequence goes behind the end
    counted[torch.where(first, slots, len(state_lens)).long()] = seq_lens
    state_lens.copy_(counted[:-1])


def _with_accepted(one: Sequence, draft_rows: Tensor | None, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Accepted draft tokens and the sequence's rows, in order, as float32 [accepted + rows, ..]; the latter put their drafts aside."""
    before = accepted_inputs(one, draft_rows, inputs)
    found = [torch.cat([kept.float(), each[one.rows].float()]) for kept, each in zip(before, inputs)]
    keep_drafts(one, draft_rows, inputs)
    return found


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor,
    silu: bool, draft_rows: Tensor | None = None, state_lens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    out, taps = torch.zeros_like(x), weight.float().T  # [K, C]
    for one in sequences(slots, query_start, seq_lens, draft_rows, state_lens):
        before = torch.zeros_like(states[one.slot]) if one.begins else states[one.slot]
        [rows] = _with_accepted(one, draft_rows, (x,))
        seen = torch.cat([before, rows.to(states.dtype)])  # [K - 1 + accepted + rows, C]
        for at in range(one.rows.start, one.rows.stop):
            found = (seen[one.accepted + at - one.rows.start :][: len(taps)].float() * taps).sum(0)
            found = found if bias is None else found + bias.float()
            out[at] = (torch.nn.functional.silu(found) if silu else found).to(out.dtype)
        states[one.slot] = seen[one.behind :][: len(taps) - 1]
    return out


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor,
    query_start: Tensor, seq_lens: Tensor, normalize: bool, draft_rows: Tensor | None = None,
    state_lens: Tensor | None = None, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    out = torch.zeros_like(value)
    if A_log is not None and dt_bias is not None:
        decay, beta = gates(decay, beta, A_log, dt_bias)
    query, key = (of_each_head(one, value.shape[1]) for one in (query, key))
    queries = unit(query.float()) if normalize else query.float()
    for one in sequences(slots, query_start, seq_lens, draft_rows, state_lens):
        state = torch.zeros_like(states[one.slot]) if one.begins else states[one.slot].clone()  # [H, D, Dv]
        keys, values, logs, betas = _with_accepted(one, draft_rows, (key, value, decay, beta))
        keys = unit(keys) if normalize else keys
        kept = logs.exp().view(*logs.shape[:2], -1, 1)
        for at in range(len(keys)):
            state = state * kept[at]
            known = (state * keys[at, :, :, None]).sum(1)
            state = state + keys[at, :, :, None] * ((values[at] - known) * betas[at, :, None])[:, None]
            if at + 1 == one.behind:
                states[one.slot] = state
            if (row := one.rows.start + at - one.accepted) >= one.rows.start:
                out[row] = ((state * queries[row, :, :, None]).sum(1) * query.shape[2] ** -0.5).to(out.dtype)
    return out


def of_each_head(x: Tensor, heads: int) -> Tensor:
    """Rows [T, G, D] of groups of heads -> [T, heads, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def unit(x: Tensor) -> Tensor:
    """Each row divided by its length."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def time_steps(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float | None, dt_max: float | None
) -> Tensor:
    """float32 [T, H]; see `kernels.ops`."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    return dt if dt_min is None and dt_max is None else dt.clamp(dt_min, dt_max)


def rates_of(A: Tensor, A_log: bool) -> Tensor:
    """float32 like A; see `kernels.ops`."""
    return -A.float().exp() if A_log else A.float()


def gates(decay: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """(log decays float32, betas) [T, H] of both as projected, A_log and dt_bias [H]; rounds as transformers' modules do."""
    return rates_of(A_log, True) * time_steps(decay, dt_bias, True, None, None), beta.sigmoid()


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    dt_min: float | None, dt_max: float | None, A_log: bool, states: Tensor, slots: Tensor, query_start: Tensor,
    seq_lens: Tensor, draft_rows: Tensor | None = None, state_lens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    dt = time_steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    heads = x.shape[1]
    share = heads // B.shape[1]
    out = torch.zeros_like(x, dtype=torch.float32)
    C = C.float().repeat_interleave(share, 1)  # [T, H, N]
    rates = rates_of(A, A_log).view(heads, 1, -1)
    for one in sequences(slots, query_start, seq_lens, draft_rows, state_lens):
        state = torch.zeros_like(states[one.slot]) if one.begins else states[one.slot].clone()  # [H, P, N]
        inputs, steps, keys = _with_accepted(one, draft_rows, (x, dt, B))
        keys = keys.repeat_interleave(share, 1)
        for at in range(len(inputs)):
            step = steps[at, :, None, None]
            state = state * (step * rates).exp() + step * keys[at, :, None] * inputs[at, :, :, None]
            if at + 1 == one.behind:
                states[one.slot] = state
            if (row := one.rows.start + at - one.accepted) >= one.rows.start:
                out[row] = (state * C[row, :, None]).sum(-1)
                if D is not None:
                    out[row] += D.float()[:, None] * x[row].float()
    return out
