"""Calling a forward on a staged step, compiled or not; which of its sizes stay symbolic when it is compiled.

Knows the order of `PagedModel.forward`'s arguments; knows no compiler and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pagegraph.compiler.model.paged import Forwarded
from pagegraph.compiler.step.staging import Staged
from pagegraph.compiler.step.state import DeviceState


def mark_dynamic(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    logits_index: torch.Tensor,
) -> None:
    """Tokens, sequences and table width stay symbolic, so one graph serves every step.

    A step of one token is left alone but for the table: size one is always a constant to the compiler.
    Sizes that happen to be equal in the first call are taken for the same symbol: compile on distinct ones.
    """
    if len(token_ids) > 1:
        for tensor in (token_ids, positions, slot_mapping, block_tables, query_start, seq_lens, slots, logits_index):
            torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.mark_dynamic(block_tables, 1)


def step_inputs(staged: Staged) -> tuple[torch.Tensor, ...]:
    """The tensors of `PagedModel.forward`, less the caches."""
    return (
        staged.token_ids,
        staged.positions,
        staged.slot_mapping,
        staged.block_tables,
        staged.query_start,
        staged.seq_lens,
        staged.metadata.slots,
        staged.logits_index,
    )


def run_forward(forward: Callable[..., Forwarded], staged: Staged, state: DeviceState) -> Forwarded:
    """Run a forward, compiled or not, on a staged step."""
    return forward(*step_inputs(staged), *state.caches)
