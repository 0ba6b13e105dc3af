"""Paged attention on CUDA: which kernels a step launches, from its sizes alone.

No value is read back to the host, so the launches can be captured in a CUDA graph and replayed with other metadata at the
same addresses. Imports Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagegraph.kernels.attention import prefill_hopper
from pagegraph.kernels.attention.decode import attend_rows, by_token
from pagegraph.kernels.attention.fixed import attend_fixed
from pagegraph.kernels.attention.kv_cache import write_kv
from pagegraph.kernels.attention.prefill import attend_ragged
from pagegraph.kernels.attention.rope_kv_cache import rope_write

METADATA = 8  # arguments of attention behind the block tables, a section being the last


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
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    write_kv(key, value, key_cache, value_cache, slot_mapping)
    return _attend(
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        seq_lens,
        sinks,
        scale,
        window,
        softcap,
        chunk,
        section,
    )


def rope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *metadata: Tensor | float | int | None,
) -> Tensor:
    """See `kernels.ops`; queries and keys are rotated, and keys and values stored, by one kernel."""
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    rotated = rope_write(query, key, value, cos, sin, query_norm, key_norm, eps, key_cache, value_cache, slot_mapping)
    return _attend(rotated, key_cache, value_cache, *metadata)


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, *rest: Tensor | float | int | None
) -> Tensor:
    """Attention over blocks that hold the step's own keys and values already.

    A bucket with a row a sequence (T <= S) is all the decode kernel's, whatever its real rows are. A larger one
    runs both kernels; each leaves the other's sequences alone. Padding rows are the decode kernel's. With a section one
    kernel takes all rows.
    """
    if len(rest) == METADATA:
        *rest, section = rest
        if section:
            return attend_fixed(query, key_cache, value_cache, block_tables, *rest, section)
    tokens, num_seqs = query.shape[0], block_tables.shape[0]
    out = torch.empty(tokens, query.shape[1], value_cache.shape[3], dtype=query.dtype, device=query.device)
    metadata = (key_cache, value_cache, block_tables, *rest)
    attend_rows(out, query, *metadata)
    if not by_token(tokens, num_seqs):
        hopper = prefill_hopper.takes(query, key_cache, value_cache)
        (prefill_hopper.attend_ragged if hopper else attend_ragged)(out, query, *metadata)
    return out


def _dense_rows(rows: Tensor) -> Tensor:
    """Heads may be strided (a transpose, a slice of a merged projection); elements of a head may not."""
    return rows if rows.stride(2) == 1 else rows.contiguous()
