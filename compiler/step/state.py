"""Tensors that outlive a step: caches, block tables, each slot's last token, text, draft tokens, penalty counts.

A slot is a place in the batch that a running sequence owns: an index of every tensor here. Padding uses the dummy slot
`max_num_seqs` and the null block. On CUDA every tensor keeps its address, so captured graphs stay valid. Knows no
scheduling and no model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pagegraph.compiler.step.caches import Caches


class NgramRange(NamedTuple):
    """Draft tokens come from the slot's own text: what followed its last `least` to `most` tokens before."""

    least: int
    most: int


class DeviceState:
    """Everything on the device that a later step reads."""

    def __init__(
        self,
        caches: Caches,
        *,
        block_size: int,
        max_num_seqs: int,
        max_blocks: int,
        vocab_size: int,
        device: torch.device,
        max_draft_tokens: int = 0,
        ngram: NgramRange | None = None,
    ) -> None:
        """max_draft_tokens: of a slot in one step; ngram: the device proposes them itself."""
        self.dummy_slot = max_num_seqs
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.caches = caches
        self.block_tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.last_at = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)  # their positions
        self.allow_drafts(max_draft_tokens, ngram)
        self._counts: tuple[torch.Tensor, torch.Tensor] | None = None

    def allow_drafts(self, most: int, ngram: NgramRange | None) -> None:
        """See `__init__`; before graphs are captured."""
        slots, device = len(self.block_tables), self.block_tables.device
        self.max_draft_tokens = most
        self.draft_tokens = torch.zeros(slots, max(most, 1), dtype=torch.int32, device=device)
        self.ngram = ngram
        self.history: torch.Tensor | None = (
            None  # every slot's tokens by position, with room for one behind the last block
        )
        if ngram is not None:
            self.history = torch.zeros(slots, self.max_blocks * self.block_size + 1, dtype=torch.int32, device=device)

    def penalty_counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(output counts int32, prompt presence bool), each [max_num_seqs + 1, vocab]; made at first use."""
        if self._counts is None:
            shape, device = (self.dummy_slot + 1, self.vocab_size), self.last_tokens.device
            self._counts = (
                torch.zeros(shape, dtype=torch.int32, device=device),
                torch.zeros(shape, dtype=torch.bool, device=device),
            )
        return self._counts

    def remember(self, slot: int, tokens: np.ndarray) -> None:
        """Note tokens int32 [n] that a slot begins with and no step computes: its blocks hold their keys and values."""
        if self.history is not None:
            given = torch.from_numpy(np.ascontiguousarray(tokens))
            if self.history.device.type == "cuda":
                given = given.pin_memory()
            self.history[slot, : len(tokens)].copy_(given, non_blocking=True)

    def reset_slot(self, slot: int, prompt_ids: np.ndarray, output_ids: np.ndarray) -> None:
        """Rebuild the penalty counts of `slot` for a sequence that starts or restarts in it."""
        outputs, prompt = self.penalty_counts()
        device = outputs.device
        outputs[slot].zero_()
        prompt[slot].zero_()
        prompt[slot].index_fill_(0, torch.as_tensor(prompt_ids, dtype=torch.long, device=device), True)
        ids = torch.as_tensor(output_ids, dtype=torch.long, device=device)
        outputs[slot].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
