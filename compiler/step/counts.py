"""What has been launched so far, in running totals."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepCounts:
    """Totals over launched steps; `padding`: tokens that buckets added to `tokens`."""

    steps: int = 0
    graphed: int = 0  # replayed as a CUDA graph
    tokens: int = 0
    padding: int = 0

    def launched(self, tokens: int, padded: int, graphed: bool) -> None:
        self.steps += 1
        self.graphed += graphed
        self.tokens += tokens
        self.padding += padded - tokens
