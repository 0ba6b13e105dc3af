"""Runs a paged model over packed ragged steps, the way the engine would, with random block placement."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from pagegraph.compiler.model.paged import Forwarded
from pagegraph.compiler.model.probe import AttentionLayout

BLOCK = 8


def run_paged(
    forward: Callable[..., Forwarded],
    layouts: list[AttentionLayout],
    prompts: list[list[int]],
    schedule: list[list[int]],
    dtype: torch.dtype = torch.float32,
    pad: int = 2,
) -> list[dict[int, torch.Tensor]]:
    """`schedule[step][s]` tokens of sequence s run in that step -> per sequence, position -> logits [vocab]."""
    num_blocks = sum(-(-len(p) // BLOCK) for p in prompts) + 3
    blocks = list(range(1, num_blocks))
    random.Random(0).shuffle(blocks)
    tables = []
    for prompt in prompts:
        tables.append([blocks.pop() for _ in range(-(-len(prompt) // BLOCK))])
    width = max(2, max(map(len, tables)))
    # Unused slots are poisoned: attention that reads past a sequence shows as NaN.
    keys = [torch.full((num_blocks, BLOCK, a.num_kv_heads, a.head_size), torch.nan, dtype=dtype) for a in layouts]
    values = [torch.full((num_blocks, BLOCK, a.num_kv_heads, a.value_size), torch.nan, dtype=dtype) for a in layouts]
    computed = [0] * len(prompts)
    logits: list[dict[int, torch.Tensor]] = [{} for _ in prompts]
    for counts in schedule:
        live = [s for s, n in enumerate(counts) if n]
        ids, positions, slot_mapping, start, lens, rows = [], [], [], [0], [], []
        for s in live:
            for at in range(computed[s], computed[s] + counts[s]):
                ids.append(prompts[s][at])
                positions.append(at)
                slot_mapping.append(tables[s][at // BLOCK] * BLOCK + at % BLOCK)
            computed[s] += counts[s]
            start.append(len(ids))
            lens.append(computed[s])
            rows.append(tables[s] + [0] * (width - len(tables[s])))
        extra = min(pad, 1)  # padding tokens and one padding sequence, as a bucket would have
        tensor = lambda x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
        out, _ = forward(
            tensor(ids + [0] * pad),
            tensor(positions + [0] * pad),
            tensor(slot_mapping + [0] * pad),
            tensor(rows + [[0] * width] * extra),
            tensor(start + [start[-1]] * extra),
            tensor(lens + [0] * extra),
            torch.tensor([e - 1 for e in start[1:]] + [0] * extra),
            keys,
            values,
        )
        for row, s in enumerate(live):
            logits[s][computed[s] - 1] = out[row].float()
    assert computed == [len(p) for p in prompts], "the schedule must run every prompt whole"
    return logits
