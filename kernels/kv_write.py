"""Triton kernel that stores a step's keys and values into pages and clears the output rows of padding.

One program a token. Knows the layout of pages, nothing of sequences but where the last one ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WARPS = 4


def launch_kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write key [T, Hkv, D] and value [T, Hkv, Dv] at slots int32 [T]; zero out [T, Hq, Dv] past query_start[S]."""
    tokens, heads, size = key.shape
    value_size = value.shape[2]
    kv_write_kernel[(tokens,)](
        key, value, key_cache, value_cache, slots, query_start, out,
        query_start.shape[0] - 1,
        key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2),
        out.stride(0),
        **kv_write_tiles(heads, size, value_size, out.shape[1]),
        num_warps=WARPS,
    )  # fmt: skip


def kv_write_tiles(heads: int, size: int, value_size: int, query_heads: int) -> dict[str, int]:
    """Compile-time arguments of the kernel for one model's shapes."""
    return {
        "HEADS": heads,
        "SIZE": size,
        "VALUE_SIZE": value_size,
        "QUERY_HEADS": query_heads,
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "BLOCK_SIZE": triton.next_power_of_2(size),
        "BLOCK_VALUE": triton.next_power_of_2(value_size),
        "BLOCK_OUT": 1024,
    }


@triton.jit
def kv_write_kernel(
    key, value, key_cache, value_cache, slots, query_start, out,
    num_sequences,
    key_stride_token, key_stride_head, key_stride_size,
    value_stride_token, value_stride_head, value_stride_size,
    out_stride_token,
    HEADS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, QUERY_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Caches are contiguous, so a slot is HEADS * SIZE elements long; `out` is contiguous within a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]

    at = tl.arange(0, BLOCK_SIZE)[None, :]
    inside = (head < HEADS) & (at < SIZE)
    row = tl.load(key + token * key_stride_token + head * key_stride_head + at * key_stride_size, mask=inside)
    tl.store(key_cache + slot * (HEADS * SIZE) + head * SIZE + at, row, mask=inside)

    at = tl.arange(0, BLOCK_VALUE)[None, :]
    inside = (head < HEADS) & (at < VALUE_SIZE)
    row = tl.load(value + token * value_stride_token + head * value_stride_head + at * value_stride_size, mask=inside)
    tl.store(value_cache + slot * (HEADS * VALUE_SIZE) + head * VALUE_SIZE + at, row, mask=inside)

    if token >= tl.load(query_start + num_sequences):
        for begin in range(0, QUERY_HEADS * VALUE_SIZE, BLOCK_OUT):
            at = begin + tl.arange(0, BLOCK_OUT)
            zero = tl.zeros([BLOCK_OUT], out.dtype.element_ty)
            tl.store(out + token * out_stride_token + at, zero, mask=at < QUERY_HEADS * VALUE_SIZE)
