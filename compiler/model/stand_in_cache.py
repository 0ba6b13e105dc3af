"""What a forward is given where transformers would give it a cache: it keeps nothing, and says which layer computes.

Keys and values go to attention as they are, and so does what a layer convolves: both are kept by ops of ours
(`compiler.model.paged`, `compiler.model.recurrent`). Knows no model and no step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pagegraph.compiler.model.forward_local import forward_local


class StandInCache:
    """For forwards that number tokens by their place in the step and add how many came before, and for layers with state.

    Before each token were as many as its position, less its place in the step.
    """

    is_compileable = False

    def __init__(self, positions: torch.Tensor, recurrence_of: Callable[[int], Any] | None = None) -> None:
        """positions: [1, T]; recurrence_of: what computes a layer with state, by its number."""
        self.before = positions[0] - torch.arange(positions.shape[1], device=positions.device)
        self.recurrence_of = recurrence_of
        self.asked = 0

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        self.asked += 1
        return self.before

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Never: a layer is then computed by the functions that take many tokens, which are ours."""
        return False

    def update_conv_state(self, inputs: torch.Tensor, layer_idx: int, **_: Any) -> torch.Tensor:
        """The layer is about to convolve `inputs`."""
        if self.recurrence_of is not None:
            forward_local.recurrence = self.recurrence_of(layer_idx)
        return inputs

    def update_recurrent_state(self, states: Any, layer_idx: int, **_: Any) -> Any:
        return states


def cache_arguments(name: str, past: StandInCache, positions: torch.Tensor) -> dict[str, Any]:
    """What a forward is given that calls its cache so; positions: [1, T].

    Without a mask of its own, some that number tokens make one of as many as they think there are.
    """
    if past.recurrence_of is not None:
        return {name: past}
    return {name: past, "attention_mask": torch.ones_like(positions)}
