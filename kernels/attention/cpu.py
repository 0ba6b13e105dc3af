"""Paged attention on the CPU: decode rows in one batch, longer rows one sequence at a time.

Reads only the blocks of the sequences at hand. Decode rows go through `cpu_decode` where that is built; the rest is made
of PyTorch's fused attention, and soft caps and sinks, which it does not have, take the reference's formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pagegraph.kernels.attention import cpu_decode, cpu_fixed, reference


def rope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    *rest: Tensor | float | int | None,
) -> Tensor:
    """See `kernels.ops`."""
    query = reference.norm_and_rotate(query, cos, sin, query_norm, eps)
    key = reference.norm_and_rotate(key, cos, sin, key_norm, eps)
    return paged_attention(query, key, value, *rest)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
    section: int = 0,
) -> Tensor:
    """See `kernels.ops` for shapes."""
    if section:
        return cpu_fixed.attend(
            query, key, value, key_cache, value_cache, slot_mapping, block_tables, query_start, seq_lens, sinks, scale,
            window, softcap, chunk,
        )  # fmt: skip
    a_row_each = len(query) == len(seq_lens) and min(seq_lens.tolist(), default=0) > 0  # and no padding
    if a_row_each and cpu_decode.takes(query, key_cache, sinks, softcap):
        return cpu_decode.attend(
            query, key, value, key_cache, value_cache, slot_mapping, block_tables, seq_lens, scale, window, chunk
        )
    _write(key, value, key_cache, value_cache, slot_mapping)
    if a_row_each:
        return _decode(query, key_cache, value_cache, block_tables, seq_lens, sinks, scale, window, softcap, chunk)
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    counts = query_start.diff()
    plain = sinks is None and not softcap
    decode = torch.nonzero(counts == 1)[:, 0]
    if len(decode):
        rows = query_start[decode].long()
        out[rows] = _decode(
            query[rows],
            key_cache,
            value_cache,
            block_tables[decode],
            seq_lens[decode],
            sinks,
            scale,
            window,
            softcap,
            chunk,
        )
    for sequence in torch.nonzero(counts > 1)[:, 0].tolist():
        begin, end, length = int(query_start[sequence]), int(query_start[sequence + 1]), int(seq_lens[sequence])
        keys = _blocks(key_cache, block_tables[sequence], length).to(query.dtype)
        values = _blocks(value_cache, block_tables[sequence], length).to(query.dtype)
        if plain:
            out[begin:end] = _fused(query[begin:end], keys, values, scale, window, chunk)
        else:
            out[begin:end] = reference.attend(query[begin:end], keys, values, sinks, scale, window, softcap, chunk).to(
                out.dtype
            )
    return out


def _write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """`reference.write_kv` in fewer calls where one row is written as it is."""
    if len(slot_mapping) != 1 or key_cache.dtype != key.dtype:
        return reference.write_kv(key, value, key_cache, value_cache, slot_mapping)
    block, offset = divmod(int(slot_mapping), key_cache.shape[1])
    key_cache[block, offset] = key[0]
    value_cache[block, offset] = value[0]


def _decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *rest: Tensor | float | int | None,
) -> Tensor:
    """One query row [R, Hq, D] a sequence or draft token, at once where that saves reading blocks twice -> [R, Hq, Dv]."""
    sinks, scale, window, softcap, chunk = rest
    if cpu_decode.takes(query, key_cache, sinks, softcap):
        return cpu_decode.attend(query, None, None, key_cache, value_cache, None, tables, lengths, scale, window, chunk)
    runs = _runs(tables, lengths) if len(query) > 1 else None
    if runs is None:
        return _attend(query[:, None], key_cache, value_cache, tables, lengths, *rest)[:, 0]
    out = query.new_empty(len(query), query.shape[1], value_cache.shape[3])
    for size in runs[runs > 0].unique().tolist():
        rows = torch.nonzero(runs == size) + torch.arange(size)  # [runs of that size, size]
        last = rows[:, -1]
        out[rows] = _attend(query[rows], key_cache, value_cache, tables[last], lengths[last], *rest)
    return out


def _runs(tables: Tensor, lengths: Tensor) -> Tensor | None:
    """Rows that follow each other in one sequence, its blocks and one key more: the size of a run at its first row, 0 elsewhere.

    None if there are no such rows.
    """
    follows = lengths[1:] == lengths[:-1] + 1
    if follows.any():  # tables are compared only where lengths leave it open
        follows &= ((tables[1:] == tables[:-1]) | (tables[:-1] == 0)).all(dim=1)
    if not follows.any():
        return None
    first = torch.nonzero(torch.cat([follows.new_ones(1), ~follows]))[:, 0]
    return torch.zeros_like(lengths).index_put_(
        (first,), torch.cat([first[1:], first.new_tensor([len(lengths)])]).sub(first).int()
    )


def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> Tensor:
    """The last n positions of R sequences: query [R, n, Hq, D], lengths [R] with them -> [R, n, Hq, Dv].

    Each position is computed as if it were alone: the order of sums, and so the rounding, does not depend on n.
    """
    rows, count, heads, size = query.shape
    known = lengths.tolist()
    width = max(known)
    keys = _gather(key_cache, tables, width).to(query.dtype)
    values = _gather(value_cache, tables, width).to(query.dtype)
    for row, length in enumerate(known):
        if length < width:
            # Slots that hold no token of the sequence may hold anything, NaN too, which no mask of logits keeps out.
            keys[row, length:] = 0
            values[row, length:] = 0
    seen = None
    if rows > 1 or count > 1 or window or chunk:
        at = torch.arange(width)
        last = (lengths[:, None] + torch.arange(-count, 0))[:, :, None]
        seen = at <= last
        if window:
            seen = seen & (at > last - window)
        if chunk:
            seen = seen & (at // chunk == last // chunk)
        seen = seen[:, :, None, None]
    groups = key_cache.shape[2]
    # [.., Hkv, G, D] x [.., Hkv, L, D]: the query heads of a group share their key head, nothing is repeated.
    grouped = query.view(rows, count, groups, heads // groups, size)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if count == 1:
        out = _softmax_over(grouped[:, 0], keys, values, seen if seen is None else seen[:, 0], sinks, scale, softcap)
    else:
        shared = [
            one.unsqueeze(1).expand(-1, count, -1, -1, -1) for one in (keys, values)
        ]  # views: no copy for each position
        each = zip(grouped, *shared, seen)
        out = torch.stack([_softmax_over(*one, sinks, scale, softcap) for one in each])
    return out.reshape(rows, count, heads, -1)


def _softmax_over(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """query [R, Hkv, G, D], keys and values [R, Hkv, L, *], seen bool [R, 1, 1, L] or None: all -> [R, Hkv, G, Dv]."""
    if sinks is None and not softcap:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
    rows, groups, shared, _ = query.shape
    logits = torch.matmul(query.float(), keys.float().transpose(2, 3)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, groups, shared, 1).expand(rows, -1, -1, 1)
        weights = torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    return torch.matmul(weights, values.float()).to(query.dtype)


def _fused(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, chunk: int) -> Tensor:
    """Rows of one sequence: query [Q, Hq, D], keys [N, Hkv, D], values [N, Hkv, Dv] -> [Q, Hq, Dv]."""
    whole = query.shape[0] == keys.shape[0]
    mask = (
        None
        if whole and not window and not chunk
        else reference.visible(len(query), len(keys), window, chunk, query.device)
    )
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


def _blocks(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """First `length` tokens of the table [max_blocks]: [length, H, D], a view of the cache where the blocks lie side by side."""
    num_blocks = -(-length // cache.shape[1])
    known = table[:num_blocks].tolist()
    if known == list(range(known[0], known[0] + num_blocks)):
        first = known[0] * cache.shape[1]
        return cache.view(-1, *cache.shape[2:])[first : first + length]
    return cache.index_select(0, table[:num_blocks]).flatten(0, 1)[:length]


def _gather(cache: Tensor, tables: Tensor, width: int) -> Tensor:
    """First `width` tokens of every table: [R, width, H, D]; of several tables a copy."""
    if len(tables) == 1:
        return _blocks(cache, tables[0], width)[None]
    num_blocks = -(-width // cache.shape[1])
    picked = cache.index_select(0, tables[:, :num_blocks].flatten())
    return picked.view(len(tables), num_blocks * cache.shape[1], *cache.shape[2:])[:, :width]
