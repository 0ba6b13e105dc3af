"""Attention of decode rows on a CPU in C++ (`cpu_decode.cpp`).

Five times faster than PyTorch's calls for one row, whose time is mostly dispatch. Where it is not built, or does not take a step, `kernels.attention.cpu` has those calls. Knows no prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagegraph.kernels import cpp_extension

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = ["void*"] * 7 + ["int32_t*"] * 3 + ["void*"] + ["int64_t"] * 18 + ["float"]

_kernel: Any = None  # the function, or None where it is not built


def build() -> None:
    """From here on `takes` may say yes."""
    global _kernel
    _kernel = cpp_extension.built(SOURCE, ARGUMENTS, "attention of single tokens stays PyTorch's, which takes longer")


def built_as() -> str:
    """What tells graphs compiled with it from others."""
    return "" if _kernel is None else SOURCE.stem


def takes(query: Tensor, key_cache: Tensor, sinks: Tensor | None, softcap: float) -> bool:
    """Whether `attend` is there for steps of this kind."""
    return takes_dtypes(query.dtype, key_cache.dtype, sinks, softcap)


def takes_dtypes(states: torch.dtype, cache: torch.dtype, sinks: object | None, softcap: float) -> bool:
    known = states == cache and states in (torch.bfloat16, torch.float32)
    return _kernel is not None and known and sinks is None and not softcap


def attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor | None,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    chunk: int,
) -> Tensor:
    """A row each of R sequences: query [R, Hq, D] -> [R, Hq, Dv]; key, value [R, Hkv, *], where given, go to their slots first.

    lengths int32 [R], at least 1, tables int32 [R, blocks]; the rest as in `kernels.ops`.
    """
    write = key is not None
    query, key, value = (_rows(one) for one in ((query, key, value) if write else (query, query, query)))
    if tables.stride(1) != 1:
        tables = tables.contiguous()
    out = query.new_empty(*query.shape[:2], value_cache.shape[3])
    strides = [one.stride() for one in (query, key, value)]
    numbers = numbers_of(
        query.dtype, query.shape, value_cache.shape, strides, tables.stride(0), window, chunk, write, False
    )
    _kernel(
        query,
        key,
        value,
        query,
        query,
        key_cache,
        value_cache,
        slot_mapping if write else lengths,
        tables,
        lengths,
        out,
        *numbers,
        scale,
    )
    return out


def numbers_of(
    dtype: torch.dtype,
    query: Sequence[int],
    values: Sequence[int],
    strides: Sequence[Sequence[int]],
    table_stride: int,
    window: int,
    chunk: int,
    write: bool,
    rotated: bool,
) -> list[int]:
    """The kernel's numbers, in its order: query [R, Hq, D] and value cache [.., block, Hkv, Dv] by their shapes, strides of query, key, value."""
    ours = [int(stride) for one in strides for stride in one[:2]]
    heads = [*query[:2], values[2], query[2], values[3], values[1]]
    return [
        *ours,
        *map(int, heads),
        table_stride,
        window,
        chunk,
        int(write),
        int(rotated),
        int(dtype == torch.bfloat16),
    ]


def attend_into(*tensors: Tensor, numbers: Sequence[int], scale: float, out: Tensor) -> Tensor:
    """One row [1, Hq, D] into out [1, Hq, Dv], called by compiled graphs, which know sizes and strides before.

    tensors: query, key, value, cos and sin [1, D] (anything where not rotated), caches, slots, tables, lengths.
    numbers: those of the kernel.
    """
    if _kernel is None:  # compiled by a process in which it was
        raise RuntimeError(f"{SOURCE.name} is not built")
    _kernel(*tensors, out, *numbers, scale)
    return out


def _rows(heads: Tensor) -> Tensor:
    return heads if heads.stride(2) == 1 else heads.contiguous()
