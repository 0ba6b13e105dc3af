"""Paged attention, rotation and KV writes in plain PyTorch: the specification and the oracle of the tests.

In the order of the formulas, slow on purpose where a loop says it more plainly. Knows no device, no blocks beyond their layout, no Triton.
"""

from __future__ import annotations

import torch

from pagegraph.kernels.dtypes import FP8_MAX


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] at `slot_mapping` (int32 [T], block * block_size + offset), in place.

    A cache of e4m3 holds them by a scale of 1; what lies beyond its largest, 448, becomes that.
    """
    where = slot_mapping.long()
    for heads, cache in ((key, key_cache), (value, value_cache)):
        if cache.dtype == torch.float8_e4m3fn:
            heads = heads.float().clamp(-FP8_MAX, FP8_MAX)
        cache.view(-1, *cache.shape[2:])[where] = heads.to(cache.dtype)


def norm_and_rotate(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """heads [T, H, D], cos and sin [T, D], norm [D] -> [T, H, D]: RMS norm where given, then half-split rotation.

    RoFormer's rotation (Su et al. 2021) with element i paired with i + D / 2, as GPT-NeoX lays it out.
    """
    wide = heads.float()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.float()
    low, high = wide.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return (wide * cos.float()[:, None] + turned * sin.float()[:, None]).to(heads.dtype)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> torch.Tensor:
    """Softmax attention over blocks, one sequence after the other, in float32; shapes as in `kernels.ops`."""
    write_kv(key, value, key_cache, value_cache, slot_mapping)
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start == rows.stop:
            continue
        keys = _read(key_cache, block_tables[sequence], length)
        values = _read(value_cache, block_tables[sequence], length)
        out[rows] = attend(query[rows], keys, values, sinks, scale, window, softcap, chunk).to(out.dtype)
    return out


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> torch.Tensor:
    """query [Q, Hq, D], the last Q positions of keys [N, Hkv, D] and values [N, Hkv, Dv] -> float32 [Q, Hq, Dv]."""
    group = query.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(group, dim=1)
    values = values.float().repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible(query.shape[0], keys.shape[0], window, chunk, query.device), -torch.inf)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, query.shape[0], 1)
        weights = torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def visible(num_queries: int, num_keys: int, window: int, chunk: int, device: torch.device) -> torch.Tensor:
    """Which keys each of the last `num_queries` positions attends to: bool [Q, N]."""
    at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    mask = keys <= at
    if window:
        mask &= keys > at - window
    if chunk:
        mask &= keys // chunk == at // chunk
    return mask


def _read(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    num_blocks = -(-length // cache.shape[1])
    return cache[table[:num_blocks].long()].flatten(0, 1)[:length]
