"""Attention on a CPU with one order of sums for every row of every step, in C++ (`cpu_fixed.cpp`).

What a row gives depends on its position and its sequence's keys and values alone: not on the rows beside it, on what is a
prompt, or on how many threads there are. Knows float32 and bfloat16, over blocks of the same or of e4m3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pagegraph.kernels import cpp_extension
from pagegraph.kernels.attention import reference

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = ["void*"] * 5 + ["int32_t*"] * 4 + ["float*", "void*"] + ["int64_t"] * 17 + ["float"] * 2
DTYPES = (torch.float32, torch.bfloat16)  # of queries
KINDS = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.float32, torch.float8_e4m3fn): 2,
    (torch.bfloat16, torch.float8_e4m3fn): 3,
}


@cache
def build() -> Callable:
    """The kernel; RuntimeError where it does not build, for nothing else keeps the order."""
    kernel = cpp_extension.built(SOURCE, ARGUMENTS, "deterministic=true cannot be served", reordered=False)
    if kernel is None:
        raise RuntimeError(
            f"deterministic=true needs {SOURCE.name}, which does not build here; set deterministic=false"
        )
    return kernel


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> Tensor:
    """`pagegraph::paged_attention`, keys and values written first."""
    query, key, value = (one if one.stride(2) == 1 else one.contiguous() for one in (query, key, value))
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    kind = KINDS[query.dtype, key_cache.dtype]
    if key_cache.dtype != query.dtype:
        reference.write_kv(key, value, key_cache, value_cache, slot_mapping)
    out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    strides = [stride for one in (query, key, value) for stride in one.stride()[:2]]
    sizes = [
        len(seq_lens),
        query.shape[1],
        key_cache.shape[2],
        query.shape[2],
        value_cache.shape[3],
        key_cache.shape[1],
    ]
    build()(
        query, key, value, key_cache, value_cache, slot_mapping, tables, query_start, seq_lens,
        out if sinks is None else sinks.float(), out, *strides, *sizes, tables.stride(0), window, chunk,
        int(sinks is not None), kind, scale, softcap,
    )  # fmt: skip
    return out
