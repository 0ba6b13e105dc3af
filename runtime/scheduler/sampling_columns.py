"""What each slot of the batch samples with, as columns, and the parameters of a step gathered from them.

Written when a sequence enters its slot, constant until it leaves. Knows no tokens, no blocks and no device.
"""

from __future__ import annotations

import numpy as np

from pagegraph.compiler.step.inputs import Filters, Penalties, SamplingInput
from pagegraph.runtime.scheduler.sequence import Sequence


class SamplingColumns:
    """Arrays [num_slots], float32 unless said."""

    def __init__(self, num_slots: int) -> None:
        def column(dtype: type = np.float32) -> np.ndarray:
            return np.zeros(num_slots, dtype)

        self.temperature, self.top_p, self.min_p = column(), column(), column()
        self.top_k = column(np.int32)
        self.repetition, self.presence, self.frequency = column(), column(), column()
        self.seed = column(np.int64)
        self.has_filters, self.has_penalties = column(bool), column(bool)
        self.has_grammar = column(bool)
        self.has_extras = column(bool)  # what stands in the request's parameters alone: bias, allowed ids, logprobs

    def enter(self, slot: int, sequence: Sequence) -> None:
        """The sequence takes the slot."""
        params = sequence.params
        self.temperature[slot], self.top_p[slot], self.min_p[slot] = params.temperature, params.top_p, params.min_p
        self.top_k[slot] = params.top_k
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot], self.frequency[slot] = params.presence_penalty, params.frequency_penalty
        self.seed[slot] = sequence.seed
        self.has_filters[slot] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self.has_penalties[slot] = sequence.has_penalties
        self.has_grammar[slot] = params.structured_outputs is not None
        self.has_extras[slot] = (
            len(params.logit_bias) > 0 or params.allowed_token_ids is not None or params.logprobs is not None
        )

    def of(self, slots: np.ndarray, *, filters: bool = True, penalties: bool = True) -> SamplingInput:
        """For a step of these slots, int32 [S]; `filters`, `penalties`: whether they count, if a slot asks for any."""
        sampling = SamplingInput(temperature=self.temperature[slots], seeds=self.seed[slots])
        if filters and self.has_filters[slots].any():
            sampling.filters = Filters(self.top_k[slots], self.top_p[slots], self.min_p[slots])
        if penalties and self.has_penalties[slots].any():
            sampling.penalties = Penalties(self.repetition[slots], self.presence[slots], self.frequency[slots])
        return sampling
