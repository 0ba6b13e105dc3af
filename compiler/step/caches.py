"""The tensors that layers keep between steps: keys and values in blocks, recurrent states in slots.

Separate whole tensors: a view of a shared storage would be cloned by functionalization. Knows layouts; knows no
scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pagegraph.compiler.model.probe import AttentionLayout
from pagegraph.compiler.model.recurrent import StateLayout


class Caches(NamedTuple):
    """As `PagedModel.forward` takes them, behind a step's tensors: of each layer that keeps such, in order."""

    key_caches: list[torch.Tensor]  # [num_blocks, block_size, heads, head_size]
    value_caches: list[torch.Tensor]
    conv_states: list[torch.Tensor]  # [slots, rows, channels]
    recurrent_states: list[torch.Tensor]  # float32 [slots, ..]
    # Of states that draft tokens leave no trace in; empty where there are none. See `kernels.ops`
    conv_drafts: list[torch.Tensor]  # [batch slots, 2 * max_draft_tokens + 1, channels]
    recurrent_drafts: list[torch.Tensor]  # float32 [batch slots, 2 * max_draft_tokens + 1, ..]
    state_lens: list[torch.Tensor]  # one, int32 [slots]: tokens that all layers' states of a slot are behind

    @staticmethod
    def of(
        layouts: Sequence[AttentionLayout],
        states: Sequence[StateLayout],
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        dtype: torch.dtype,
        activation_dtype: torch.dtype,
        device: torch.device,
        batch_slots: int = 0,
        max_draft_tokens: int = 0,
    ) -> Caches:
        """dtype: of keys and values. batch_slots: of the slots, those that steps may have draft tokens in, which come first."""

        def pools(sizes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
            return [torch.zeros(*size, dtype=dtype, device=device) for size in sizes]

        drafts = batch_slots, 2 * max_draft_tokens + 1

        return Caches(
            pools([(num_blocks, block_size, one.num_kv_heads, one.head_size) for one in layouts], dtype),
            pools([(num_blocks, block_size, one.num_kv_heads, one.value_size) for one in layouts], dtype),
            pools([(num_slots, *one.conv) for one in states], activation_dtype),
            pools([(num_slots, *one.recurrent) for one in states if one.recurrent], torch.float32),
            pools([(*drafts, one.conv[1]) for one in states if max_draft_tokens], activation_dtype),
            pools([(*drafts, one.inputs) for one in states if one.recurrent and max_draft_tokens], torch.float32),
            pools([(num_slots,)] if states and max_draft_tokens else [], torch.int32),
        )

    @staticmethod
    def none() -> Caches:
        """Of no layers."""
        return Caches([], [], [], [], [], [], [])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of all layers; 0 where none attends."""
        return sum(one[0].nbytes for one in (*self.key_caches, *self.value_caches))

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all slots."""
        return sum(one.nbytes for one in (*self.conv_states, *self.recurrent_states))

    @property
    def draft_bytes(self) -> int:
        """Bytes of what draft tokens bring to states."""
        return sum(one.nbytes for one in (*self.conv_drafts, *self.recurrent_drafts, *self.state_lens))

    def copy_state(self, source: int, target: int) -> None:
        """The state of slot `target` becomes that of slot `source`, where no accepted draft token is left to be taken up."""
        pools = [*self.conv_states, *self.recurrent_states, *self.state_lens]
        torch._foreach_copy_([one[target] for one in pools], [one[source] for one in pools])
