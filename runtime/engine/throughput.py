"""How fast the queue moves: prompt tokens and ended sequences for each second of steps, of the last half minute or so.

Seconds without a step are not counted: whoever waits, waits for steps. Knows no clock, no queue and no limit.
"""

from __future__ import annotations

import math

FORGET_S = 30.0  # of steps, after which a past step counts 1/e
MOST_S = 60.0  # that a client is told to wait: official clients do not wait for longer


class Throughput:
    """Sums that decay with the time of steps."""

    def __init__(self) -> None:
        self._seconds = self._prompt_tokens = self._ended = 0.0

    def stepped(self, seconds: float, prompt_tokens: int, ended: int) -> None:
        """A step took so long, computed so many tokens of prompts, and so many sequences ended with it."""
        kept = math.exp(-seconds / FORGET_S)
        self._seconds = self._seconds * kept + seconds
        self._prompt_tokens = self._prompt_tokens * kept + prompt_tokens
        self._ended = self._ended * kept + ended

    def wait_s(self, prompt_tokens: int, sequences: int) -> float:
        """Seconds in which a queue of so many sequences, with so many prompt tokens, moves through: 1 to MOST_S.

        The larger of the two estimates; one of which nothing is known yet counts for nothing.
        """
        by_tokens = prompt_tokens * self._seconds / self._prompt_tokens if self._prompt_tokens else 0.0
        by_number = sequences * self._seconds / self._ended if self._ended else 0.0
        return min(max(by_tokens, by_number, 1.0), MOST_S)
