"""Runs a paged model over packed ragged steps, the way the engine would, with random block placement."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from pagegraph.compiler.model.paged import Forwarded, PagedModel
from pagegraph.compiler.step.caches import Caches

BLOCK = 8


def run_paged(
    forward: Callable[..., Forwarded],
    paged: PagedModel,
    prompts: list[list[int]],
    schedule: list[list[int]],
    dtype: torch.dtype = torch.float32,
    pad: int = 2,
) -> list[dict[int, torch.Tensor]]:
    """Runs `forward`, which is `paged` or made of it: `schedule[step][s]` tokens of sequence s run in that step -> per sequence, position -> logits [vocab]."""
    num_blocks = sum(-(-len(p) // BLOCK) for p in prompts) + 3
    blocks = list(range(1, num_blocks))
    random.Random(0).shuffle(blocks)
    tables = []
    for prompt in prompts:
        tables.append([blocks.pop() for _ in range(-(-len(prompt) // BLOCK))])
    width = max(2, max(map(len, tables)))
    slot_of = random.Random(1).sample(range(len(prompts) + 2), len(prompts))
    caches = Caches.of(
        paged.layouts, paged.states, num_blocks=num_blocks, block_size=BLOCK, num_slots=len(prompts) + 2, dtype=dtype,
        activation_dtype=dtype, device=torch.device("cpu"),
    )  # fmt: skip
    # Poisoned: attention that reads past a sequence, or a sequence that begins from a slot's old state, shows as NaN.
    for cache in (one for kind in caches for one in kind):
        cache.fill_(torch.nan)
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
            tensor([slot_of[s] for s in live] + [0] * extra),
            torch.tensor([e - 1 for e in start[1:]] + [0] * extra),
            *caches,
        )
        for row, s in enumerate(live):
            logits[s][computed[s] - 1] = out[row].float()
    assert computed == [len(p) for p in prompts], "the schedule must run every prompt whole"
    return logits
