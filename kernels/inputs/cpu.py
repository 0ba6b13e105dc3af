"""Block tables and the inputs of a step on the CPU, by numpy. Knows no scheduling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagegraph.kernels.inputs import reference


def update_tables(tables: Tensor, new_blocks: Tensor, num_new_blocks: Tensor) -> None:
    """See `kernels.ops`."""
    if len(new_blocks):
        reference.update_tables(tables, new_blocks, num_new_blocks)


def unpack(
    token_ids: Tensor,
    slots: Tensor,
    query_start: Tensor,
    starts: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
    draft_tokens: Tensor,
    tables: Tensor,
    block_size: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.unpack` by numpy, whose calls take a fifth of the time on a few numbers."""
    given = (token_ids, slots, query_start, starts, last_tokens, last_at, draft_tokens, tables)
    ids, slot, begins, start, last_tokens, last_at, draft_tokens, tables = (one.numpy() for one in given)
    counts, live = np.diff(begins), begins[-1]
    first = ids[np.minimum(begins[:-1], len(ids) - 1)]
    start = np.where(first < 0, last_at[slot] - 1 - first, start)
    out = np.zeros((3, len(ids)), np.int32)  # ids, positions, slot_mapping
    owner = slot.repeat(counts)
    known, positions, slot_mapping = out[:, :live]
    positions[:] = np.arange(live) + (start - begins[:-1]).repeat(counts)
    known[:] = ids[:live]
    if (known < 0).any():
        draft = draft_tokens[owner, np.maximum(-2 - known, 0)] if (known < -1).any() else 0
        known[:] = np.where(known == -1, last_tokens[owner], np.where(known < 0, draft, known))
    slot_mapping[:] = tables[owner, positions // block_size] * block_size + positions % block_size
    seq_lens = np.where(counts > 0, start + counts, 0).astype(np.int32)
    out_tables = tables[slot, :width] * (np.arange(width) * block_size < seq_lens[:, None])
    last = np.maximum(begins[1:].astype(np.int64) - 1, 0)
    flat_ids, flat_positions, flat_slot_mapping = torch.from_numpy(out).unbind()
    return (
        flat_ids,
        flat_positions,
        flat_slot_mapping,
        torch.from_numpy(out_tables),
        torch.from_numpy(seq_lens),
        torch.from_numpy(last),
    )
