"""Triton: store a step's keys and values into their blocks, one program a token.

Padding tokens carry slots of the null block and are written there like any other. Knows no sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.dtypes import FP8_MAX

NUM_WARPS = 4
FP8_MAX = tl.constexpr(FP8_MAX)


@triton.jit
def stored(x, dtype: tl.constexpr):
    """x in the type of the cache; what lies beyond the largest of e4m3, which has no infinity, becomes it."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def kv_write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)[:, None]
    column = tl.arange(0, KEY_PAD)[None, :]
    inside = (head < HEADS) & (column < KEY_SIZE)
    key = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + column, mask=inside)
    to = key_cache_ptr + (slot * HEADS + head) * KEY_SIZE + column
    tl.store(to, stored(key, key_cache_ptr.dtype.element_ty), mask=inside)
    column = tl.arange(0, VALUE_PAD)[None, :]
    inside = (head < HEADS) & (column < VALUE_SIZE)
    value = tl.load(value_ptr + token * value_token_stride + head * value_head_stride + column, mask=inside)
    to = value_cache_ptr + (slot * HEADS + head) * VALUE_SIZE + column
    tl.store(to, stored(value, value_cache_ptr.dtype.element_ty), mask=inside)


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """`kernels.attention.reference.write_kv` on the device. The last dimension of key and value must be dense."""
    tokens, heads, key_size = key.shape
    value_size = value.shape[2]
    kv_write_kernel[(tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEADS=heads,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        HEADS_PAD=triton.next_power_of_2(heads),
        KEY_PAD=triton.next_power_of_2(key_size),
        VALUE_PAD=triton.next_power_of_2(value_size),
        num_warps=NUM_WARPS,
    )
