"""Paged attention on a CUDA device: the Triton kernels in the order that one step needs them.

Launches only, reads nothing back: grids follow from shapes, so one captured CUDA graph serves every batch of its
shapes.
"""

from __future__ import annotations

import torch

from kernels.attention_decode import launch_decode
from kernels.attention_prefill import launch_prefill
from kernels.kv_write import launch_kv_write


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> torch.Tensor:
    """See `kernels.ops` for shapes. Raises ValueError for a cache that is not contiguous."""
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("paged_attention needs contiguous caches: the kernels address slots, not strides")
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    launch_kv_write(key, value, key_cache, value_cache, slots, query_start, out)
    inputs = (query, key_cache, value_cache, block_tables, query_start, seq_lens, sinks, out)
    launch_prefill(*inputs, scale, window, softcap, chunk)
    launch_decode(*inputs, scale, window, softcap, chunk)
    return out
