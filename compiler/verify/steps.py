"""Steps that are run by hand, past scheduler and staging: tensors of `PagedModel.forward` for sequences of known tokens.

Knows blocks and the order of the forward's arguments; knows no engine. Nothing else may run meanwhile: the first blocks
of the cache are written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.model.paged import Forwarded


class HandSteps:
    """Sequences of at most these lengths in slots of their numbers, their blocks one behind the other from block 1 on (0 is
    the null block).
    """

    def __init__(
        self, lengths: Sequence[int], *, num_blocks: int, block_size: int, width: int, device: torch.device
    ) -> None:
        """width: of the block tables. Raises ValueError where the cache does not hold the sequences."""
        self.block_size, self.device = block_size, device
        self.tables, first = [], 1
        for length in lengths:
            blocks = -(-length // block_size)
            if first + blocks > num_blocks or blocks > width:
                raise ValueError(
                    f"a prompt of {length} tokens takes {blocks} blocks, the cache holds"
                    f" {min(num_blocks - first, width)}"
                )
            self.tables.append([*range(first, first + blocks), *[0] * (width - blocks)])
            first += blocks
        self.computed = [0] * len(lengths)

    def step(self, tokens: Sequence[Sequence[int]], rows: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The tensors, less the caches, of a step in which each sequence goes on with its `tokens`; without any it rests.

        Padded to two sequences unless it is of a single token. rows: whose logits are wanted; else those of each
        sequence's last token.
        """
        ids, positions, kv_slots, starts, lens, slots, tables = [], [], [], [0], [], [], []
        for at, new in enumerate(tokens):
            if not new:
                continue
            table, begin = self.tables[at], self.computed[at]
            self.computed[at] = end = begin + len(new)
            ids += new
            positions += range(begin, end)
            kv_slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(begin, end)]
            starts.append(len(ids))
            lens.append(end)
            slots.append(at)
            tables.append(table)
        last = [start - 1 for start in starts[1:]]
        if len(lens) == 1 and len(ids) > 1:
            starts, lens, slots, last = [*starts, starts[-1]], [*lens, 0], [*slots, 0], [*last, 0]
            tables.append([0] * len(tables[0]))
        given = [ids, positions, kv_slots, tables, starts, lens, slots]
        tensors = [torch.tensor(one, dtype=torch.int32, device=self.device) for one in given]
        return (*tensors, torch.tensor(last, device=self.device) if rows is None else rows.to(self.device))


def over_cache_of(built: BuiltModel, lengths: Sequence[int]) -> HandSteps:
    """Steps over the built model's own caches. Raises ValueError where they do not hold the sequences."""
    state = built.step.state
    if built.step.paged_model.states and len(lengths) > (slots := state.dummy_slot + 1):
        raise ValueError(
            f"{len(lengths)} sequences at a time need as many slots of recurrent state, and there are {slots};"
            f" set max_num_seqs to {len(lengths)}"
        )
    return HandSteps(
        lengths, num_blocks=built.num_blocks, block_size=state.block_size, width=state.max_blocks, device=built.device
    )


@torch.inference_mode()
def prompt_logits(
    built: BuiltModel,
    token_ids: Sequence[int],
    last: int | None = None,
    forward: Callable[..., Forwarded] | None = None,
) -> torch.Tensor:
    """Float32 logits [R, vocab] at the `last` R positions of one prompt (None: at all), on the CPU.

    forward: what computes them, such as the compiled forward, whose logits are made of its hidden states; None: the
    modules. Raises ValueError where the cache does not hold the prompt.
    """
    paged, state, size = built.step.paged_model, built.step.state, len(token_ids)
    rows = torch.arange(size - min(last or size, size), size, device=built.device)
    steps = over_cache_of(built, [size])
    if forward is None:
        logits, _ = paged(*steps.step([token_ids], rows), *state.caches)
    else:
        _, hidden = forward(*steps.step([token_ids]), *state.caches)
        if hidden is None:
            raise ValueError("the model's forward gives no hidden states")
        logits = paged.head(hidden[0, rows])
    return logits.float().cpu()
