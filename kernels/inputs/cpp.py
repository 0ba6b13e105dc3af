"""`unpack` on a CPU in C++: microseconds, by numpy's calls in cold caches twenty times that.

Where it is not built, `kernels.inputs.cpu` does it. Knows no scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pagegraph.kernels import cpp_extension
from pagegraph.kernels.inputs import cpu

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = ["int32_t*"] * 11 + ["int64_t*"] + ["int64_t"] * 6

_kernel: Callable | None = None


def build() -> None:
    """From here on `unpack` runs it."""
    global _kernel
    _kernel = cpp_extension.built(SOURCE, ARGUMENTS, "steps are unpacked by numpy, which takes longer")


def unpack(*step: Tensor | int) -> tuple[Tensor, ...]:
    """See `kernels.ops`."""
    *given, block_size, width = step
    if _kernel is None or not all(one.is_contiguous() for one in given):
        return cpu.unpack(*step)
    token_ids, slots, *_, draft_tokens, tables = given
    tokens, seqs = len(token_ids), len(slots)
    out, out_tables, seq_lens = (
        token_ids.new_empty(3, tokens),
        token_ids.new_empty(seqs, width),
        token_ids.new_empty(seqs),
    )
    last = token_ids.new_empty(seqs, dtype=torch.int64)
    _kernel(
        *given, out, out_tables, seq_lens, last, tokens, seqs, draft_tokens.shape[1], tables.shape[1], block_size, width
    )
    return *out.unbind(), out_tables, seq_lens, last
