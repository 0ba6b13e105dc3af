"""Triton: a step's queries and keys normalised and rotated, and keys and values stored into their blocks, in one kernel.

One program takes a token and either some query heads or all its key and value heads. Rotation is the half-split kind
(Su et al. 2021, in the layout of GPT-NeoX); everything is float32 until it is stored. Knows no sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.attention.kv_cache import stored
from pagegraph.kernels.pdl import dependent, wait

QUERY_HEADS = 8  # of one program
NUM_WARPS = 4


@triton.jit
def _rotated(at, inside, cos_at, sin_at, norm_ptr, half, in_half, eps, HALF: tl.constexpr, HAS_NORM: tl.constexpr):
    """Both halves, float32 [H, HALF_PAD], of the heads whose first elements `at` points to."""
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low = low * scale * tl.load(norm_ptr + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        high = high * scale * tl.load(norm_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    cos_low = tl.load(cos_at + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_at + HALF + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_at + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_at + HALF + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def rope_write_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    eps,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cos_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait()
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    half = tl.arange(0, HALF_PAD)
    in_half = half < HALF
    cos_at = cos_ptr + token * cos_stride
    sin_at = sin_ptr + token * cos_stride
    if part > 0:
        head = ((part - 1) * QUERY_HEADS + tl.arange(0, QUERY_HEADS))[:, None]
        inside = (head < HEADS) & in_half[None, :]
        at = query_ptr + token * query_token_stride + head * query_head_stride + half[None, :]
        low, high = _rotated(at, inside, cos_at, sin_at, query_norm_ptr, half, in_half, eps, HALF, HAS_NORM)
        to = out_ptr + (token * HEADS + head) * 2 * HALF + half[None, :]
        tl.store(to, low.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(to + HALF, high.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        # Names of their own: a name has one type in both branches.
        slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
        kv_head = tl.arange(0, KV_HEADS_PAD)[:, None]
        in_key = (kv_head < KV_HEADS) & in_half[None, :]
        key_at = key_ptr + token * key_token_stride + kv_head * key_head_stride + half[None, :]
        key_low, key_high = _rotated(key_at, in_key, cos_at, sin_at, key_norm_ptr, half, in_half, eps, HALF, HAS_NORM)
        key_to = key_cache_ptr + (slot * KV_HEADS + kv_head) * 2 * HALF + half[None, :]
        tl.store(key_to, stored(key_low, key_cache_ptr.dtype.element_ty), mask=in_key)
        tl.store(key_to + HALF, stored(key_high, key_cache_ptr.dtype.element_ty), mask=in_key)
        column = tl.arange(0, VALUE_PAD)[None, :]
        in_value = (kv_head < KV_HEADS) & (column < VALUE_SIZE)
        value = tl.load(value_ptr + token * value_token_stride + kv_head * value_head_stride + column, mask=in_value)
        value_to = value_cache_ptr + (slot * KV_HEADS + kv_head) * VALUE_SIZE + column
        tl.store(value_to, stored(value, value_cache_ptr.dtype.element_ty), mask=in_value)


def rope_write(
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
    slot_mapping: Tensor,
) -> Tensor:
    """Rotated queries [T, Hq, D]; keys and values go to `slot_mapping`. See `kernels.ops` for shapes; last dimensions dense."""
    tokens, heads, size = query.shape
    kv_heads, value_size = value.shape[1:]
    half = size // 2
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(tokens, heads, size, dtype=query.dtype, device=query.device)
    rope_write_kernel[tokens, 1 + triton.cdiv(heads, QUERY_HEADS)](
        out,
        query,
        key,
        value,
        cos,
        sin,
        query_norm if query_norm is not None else query,
        key_norm if key_norm is not None else key,
        key_cache,
        value_cache,
        slot_mapping,
        eps,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        VALUE_SIZE=value_size,
        QUERY_HEADS=QUERY_HEADS,
        KV_HEADS_PAD=triton.next_power_of_2(kv_heads),
        HALF_PAD=triton.next_power_of_2(half),
        VALUE_PAD=triton.next_power_of_2(value_size),
        HAS_NORM=query_norm is not None,
        num_warps=NUM_WARPS,
        **dependent(query.device),
    )
    return out
