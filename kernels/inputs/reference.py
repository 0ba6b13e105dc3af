"""Block tables and the inputs of a step in plain PyTorch: the specification and the oracle of the tests. Knows no
device.
"""

from __future__ import annotations

import torch


def update_tables(tables: torch.Tensor, new_blocks: torch.Tensor, num_new_blocks: torch.Tensor) -> None:
    """See `kernels.ops`."""
    slots, index, block = new_blocks[: int(num_new_blocks)].long().unbind(1)
    tables[slots, index] = block.int()


def unpack(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    starts: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
    draft_tokens: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.ops`."""
    counts = query_start.diff()
    padding = len(token_ids) - int(query_start[-1])
    slots = slots.long()

    def of_tokens(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values.repeat_interleave(counts), (0, padding))

    live = torch.arange(len(token_ids)) < query_start[-1]
    first = token_ids[query_start[:-1].long().clamp(max=len(token_ids) - 1)]
    starts = torch.where(first < 0, last_at[slots] - 1 - first, starts)
    positions = (torch.arange(len(token_ids), dtype=torch.int32) + of_tokens(starts - query_start[:-1])).masked_fill(
        ~live, 0
    )
    token_slots = of_tokens(slots)
    draft = draft_tokens[token_slots, (-2 - token_ids).clamp(min=0).long()]
    known = torch.where(token_ids == -1, last_tokens[token_slots], torch.where(token_ids < 0, draft, token_ids))
    ids = known.masked_fill(~live, 0)
    blocks = torch.div(positions, block_size, rounding_mode="floor")
    slot_mapping = (tables[token_slots, blocks.long()] * block_size + positions % block_size).masked_fill(~live, 0)
    seq_lens = torch.where(counts > 0, starts + counts, 0)
    used = torch.arange(width)[None] * block_size < seq_lens[:, None]
    out_tables = tables[slots, :width].masked_fill(~used, 0)
    return ids, positions, slot_mapping, out_tables, seq_lens, (query_start[1:].long() - 1).clamp(min=0)
