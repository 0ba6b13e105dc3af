"""Divides the prompt tokens of one step among prompts in order of arrival.

The first prompt that cannot end in the step leaves a share to those behind it that can: they are in and out while it is
still computed, and it loses a quarter of its speed at most. A second long prompt gets nothing of the share: computing
two at a time would delay the first and speed up neither. What nobody takes is the first one's in the end. Knows
sequences, slots and blocks by number only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PrefillBudget:
    """`tokens` that are left; `split`: whether a prompt may be computed in parts; `least`: of the share, a block."""

    tokens: int
    split: bool
    least: int
    long: int = -1  # slot of the first prompt that does not end in the step

    def offer(self, wanted: int) -> int:
        """Of `wanted` tokens, at least 1, those that the next prompt in line may have."""
        if wanted <= self.tokens:
            return wanted
        if not self.split or self.long >= 0:
            return 0
        return self.tokens - min(max(self.tokens // 4, self.least), self.tokens // 2)

    def take(self, slot: int, wanted: int, tokens: int) -> None:
        """The prompt in `slot` takes `tokens` of the `wanted` ones."""
        self.tokens -= tokens
        if tokens < wanted and self.split and self.long < 0:
            self.long = slot
