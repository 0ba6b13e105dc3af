"""What a step begins and ends with on a CPU, `unpack` and `draw`, in C++: microseconds, by numpy's calls in cold caches twenty times that.

Where they are not built, `kernels.cpu` does it. Knows no scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pagegraph.kernels import cpu, cpu_build

FOLDER = Path(__file__).parent
UNPACK = ["int32_t*"] * 11 + ["int64_t*"] + ["int64_t"] * 6
DRAW = ["int16_t*", "int64_t*", "float*"] + ["int32_t*"] * 5 + ["int64_t"] * 3

_unpack: Callable | None = None
_draw: Callable | None = None


def build() -> None:
    """From here on the ops run it."""
    global _unpack, _draw
    _unpack = cpu_build.built(FOLDER / "cpu_unpack.cpp", UNPACK, "steps are unpacked by numpy, which takes longer")
    _draw = cpu_build.built(FOLDER / "cpu_draw.cpp", DRAW, "tokens are drawn by PyTorch's calls, which take longer")


def unpack(*step: Tensor | int) -> tuple[Tensor, ...]:
    """See `kernels.ops`."""
    *given, block_size, width = step
    if _unpack is None or not all(one.is_contiguous() for one in given):
        return cpu.unpack(*step)
    token_ids, rows, *_, guesses, tables = given
    tokens, seqs = len(token_ids), len(rows)
    out, out_tables, seq_lens = token_ids.new_empty(3, tokens), token_ids.new_empty(seqs, width), token_ids.new_empty(seqs)
    last = token_ids.new_empty(seqs, dtype=torch.int64)
    _unpack(*given, out, out_tables, seq_lens, last, tokens, seqs, guesses.shape[1], tables.shape[1], block_size, width)
    return *out.unbind(), out_tables, seq_lens, last


def draw(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, rows: Tensor, sampled: Tensor, *last: Tensor) -> Tensor:
    """See `kernels.ops`. Noise is made for the sequences that draw only."""
    if _draw is None or logits.dtype not in (torch.bfloat16, torch.float32) or not logits.is_contiguous():
        return cpu.draw(logits, temperature, seeds, positions, rows, sampled, *last)
    ids = rows.new_empty(len(logits), dtype=torch.int64)
    cpu.draw_with_noise(ids, logits, temperature, seeds, positions)
    _draw(logits, ids, temperature, rows, sampled, positions, *last, *logits.shape, logits.element_size())
    return ids
