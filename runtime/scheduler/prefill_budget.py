"""Divides the prompt tokens of one step among prompts in order of arrival.

The first prompt that cannot end in the step leaves half of what there is to those behind it that end in the step, or
that are at most half as long: they are in and out while it is still computed, and it loses half of its speed at most,
and only while they last. One of them at a time is computed in parts. A prompt of like length waits: computing two at a
time would delay the first and speed up neither. What nobody takes is the first one's in the end. Knows sequences, slots
and blocks by number only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PrefillBudget:
    """`tokens` that are left; `split`: whether a prompt may be computed in parts."""

    tokens: int
    split: bool
    long: int = -1  # slot of the first prompt that does not end in the step
    overtaken: int = 0  # tokens that it still wanted
    overtaking: bool = False  # whether one behind it is computed in parts too

    def offer(self, wanted: int) -> int:
        """Of `wanted` tokens, at least 1, those that the next prompt in line may have."""
        if wanted <= self.tokens:
            return wanted
        if not self.split:
            return 0
        if self.long < 0:
            return self.tokens - self.tokens // 2
        if self.overtaking or 2 * wanted > self.overtaken:
            return 0
        return self.tokens

    def take(self, slot: int, wanted: int, tokens: int) -> None:
        """The prompt in `slot` takes `tokens` of the `wanted` ones."""
        self.tokens -= tokens
        if tokens == wanted or not self.split:
            return
        if self.long < 0:
            self.long, self.overtaken = slot, wanted
        elif tokens:
            self.overtaking = True
